"""The student's passes on one set of weights: what it samples, and its states at the tokens.

The weights do not move between sampling and training. So what sampling has computed of prompts and
completions is stored here, and `hidden` uses it where tokens and weights are still the same ones.
Only fused decoders store anything, see `fused.reuse`.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdft_lightning.forward.fused import (
    MOST_BYTES,
    Decoder,
    ReadPrompts,
    decoder_of,
    join_,
    read_prompts,
    training_dtype,
)
from sdft_lightning.forward.hidden import completion_hidden_states, output_head
from sdft_lightning.forward.layout import split_if_worth
from sdft_lightning.forward.policy import SamplingDtype
from sdft_lightning.models.precision import product_dtype
from sdft_lightning.models.sharding import empty_copy, fill_, is_sharded
from sdft_lightning.rollout.decode_mode import can_pack
from sdft_lightning.rollout.generate import (
    RolloutRequest,
    generate_rollout,
    join_requests,
    split_rollout,
)
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import OutputHead, Rollout, Tokens


class StudentPasses:
    """Answers for a model on its present weights, which `at` names.

    Samples from the model itself or from a bfloat16 copy, which is refreshed when the weights have
    moved. The copy is no part of any module: it is never trained, moved or saved. Of a model that
    is spread over processes a whole copy is made in any case: each process samples until its own
    rows are finished, and cannot wait for the others at every token.

    Args:
        dtype: same samples with the trained weights, bfloat16 with a copy, which only costs memory
            where bfloat16 is not multiplied (see `precision`); auto takes the copy where the
            hardware multiplies bfloat16 natively and the weights are float32.

    Attributes:
        model: The model; None before `at`.
        step: Its optimizer step.
    """

    def __init__(self, dtype: SamplingDtype = "auto") -> None:
        self.dtype = dtype
        self.model: Any = None
        self.step = 0
        self._copy: Any = None
        self._copied: object = None  # the weights that the copy was made of
        self._empty: Any = None
        self._stored: list[ReadPrompts] = []
        self._stored_by: object = None  # the weights that have computed these

    def at(self, model: Any, step: int) -> StudentPasses:
        """These passes, of a model at an optimizer step.

        Args:
            model: A causal language model of transformers.
            step: Tells its weights from those of other steps. Weights that were written to in
                between are noticed, too, but for those of a model that is spread over processes.
        """
        self.model, self.step = model, step
        return self

    def prepare(self, model: nn.Module) -> None:
        """Remember the form of a model that is about to be spread over processes."""
        self._copy, self._empty = None, empty_copy(model)

    def sample(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """Sample the completions of several micro-batches at once; a rollout for each.

        Each token is the inverse CDF at the number that belongs to its row and position. Where
        gradients are enabled, what the student's passes over these tokens would compute again is
        stored until `hidden` asks for it; that of former calls is dropped.

        Args:
            requests: Of micro-batches that will be trained on one after the other; alike but for
                their rows and the length of their completions.
        """
        sampler = self.sampler()
        request = join_requests(requests)
        sampling = request.sampling
        uniforms = row_uniforms(
            request.seed,
            request.step,
            request.row_ids,
            sampling.completions_per_prompt,
            sampling.max_new_tokens,
        )  # (R, T)
        rollout = generate_rollout(
            sampler,
            request.prompts,
            sampling,
            uniforms,
            request.stop_ids,
            request.pad_id,
            read=self._read(sampler, requests) if torch.is_grad_enabled() else None,
            limits=request.limits,
        )
        rollouts = split_rollout(rollout, requests)
        give_back_memory(_device(sampler))
        return rollouts

    def hidden(self, prompts: Tokens, completions: Tokens, keep: Tensor) -> Tensor:
        """Hidden states `(N, D)` that predict the kept tokens, see `completion_hidden_states`.

        Args:
            prompts: `(B, P)`, padded on the left.
            completions: `(B · n, T)`, padded on the right: n of each prompt.
            keep: `(B · n, T)` tokens of which the state is wanted.
        """
        if self._stored and self._stored_by != self._weights():
            self._stored = []
        states = completion_hidden_states(
            self.model, prompts, completions, keep, rounded=self._rounded(), read=self._stored
        )
        self._stored = [each for each in self._stored if each.is_stored]
        return states

    def head(self) -> OutputHead:
        """The model's output head; of a model in shards this takes all processes at once."""
        head, rounded = output_head(self.model), self._rounded()
        if rounded is None:
            return head
        return head._replace(rounded=rounded.get_output_embeddings().weight)

    def whole(self) -> Any:
        """The model as one that this process can call alone, not to be trained.

        Of a model that is spread over processes it is a copy; all must ask for new weights at the
        same time.
        """
        return self.sampler() if is_sharded(self.model) else self.model

    def sampler(self) -> Any:
        """The model to sample with: the model itself, or its up-to-date copy in eval mode."""
        model, weights = self.model, self._weights()
        if is_sharded(model):
            return self._whole(weights)
        if not self._uses_copy(model):
            return model
        if self._copy is None or _device(self._copy) != _device(model):
            # Never as inference tensors, or the copy could not be refreshed later.
            with torch.inference_mode(False), torch.no_grad():
                self._copy = _rounded_copy(model)
                join_(self._copy)
        elif weights != self._copied:
            with torch.inference_mode(False), torch.no_grad():
                for target, source in zip(self._copy.parameters(), model.parameters(), strict=True):
                    if source.requires_grad:  # all else stays, e.g. below adapters
                        target.copy_(source)
        self._copied = weights
        return self._copy

    def forget(self) -> None:
        """Drop the copy and what was stored, e.g. after weights were loaded."""
        self._copy, self._stored = None, []

    def _weights(self) -> tuple[int, int, int]:
        """What changes whenever the weights do; alike on all processes of a model in shards."""
        changes = 0 if is_sharded(self.model) else _changes(self.model)
        return id(self.model), self.step, changes

    def _rounded(self) -> Any:
        """The bfloat16 copy, where there is one of the present weights; else None.

        It spares to cast the weights where bfloat16 is multiplied; gradients are the model's.
        """
        model = self.model
        if self._copy is None or is_sharded(model) or not self._uses_copy(model):
            return None
        return self._copy if self._copied == self._weights() else None

    def _whole(self, weights: object) -> Any:
        if self._copy is None or weights != self._copied:
            with torch.inference_mode(False):
                whole = copy.deepcopy(self._empty) if self._copy is None else self._copy
                fill_(whole, self.model, torch.bfloat16 if self._uses_copy(self.model) else None)
                self._copy = whole.to(_device(self.model))  # the buffers
            self._copied = weights
        return self._copy

    def _uses_copy(self, model: nn.Module) -> bool:
        """Whether this model is sampled from a bfloat16 copy on its device."""
        if self.dtype == "same" or next(model.parameters()).dtype != torch.float32:
            return False
        if getattr(model, "is_quantized", False):
            return False  # its layers read 4 bits and nothing else
        return self.dtype == "bfloat16" or has_native_bfloat16(_device(model))

    def _read(self, sampler: Any, requests: Sequence[RolloutRequest]) -> list[ReadPrompts] | None:
        """Read the prompts to sample from, and store what training needs of them.

        Returns:
            The prompts of each request; None where model and sampler do not compute them alike, or
            the rollout is one that fused decoding steps are not used for.
        """
        self._stored = []
        rows = sum(len(each.limits) for each in requests)
        longest = max(each.sampling.max_new_tokens for each in requests)
        pair = _pair(self.model, sampler, rows, longest)
        if pair is None:
            return None
        self._stored_by = self._weights()
        found: list[ReadPrompts] = []
        left, each = MOST_BYTES, 0.0  # bytes left, bytes of a token
        for request in requests:
            needed = each * int(request.prompts.mask.sum())
            keep = not found or (left >= needed and len(self._stored) == len(found))
            split = split_if_worth(request.prompts)
            part = read_prompts(pair.student, split, pair.dtype, pair.sampler, keep)
            if keep:
                self._stored.append(part)
                left -= part.nbytes if found else 0
                each = part.nbytes / part.rows.ids.numel()
            found.append(part)
        return found


class _Pair(NamedTuple):
    """The student and what it is sampled with, as decoders; and the dtype that both store."""

    student: Decoder
    sampler: Decoder
    dtype: torch.dtype


def _pair(student: Any, sampler: Any, rows: int, steps: int) -> _Pair | None:
    """Student and sampler, if both are fused and multiply in the same dtype."""
    dtype = training_dtype(student)
    if dtype is None:
        return None
    rounded = sampler is student and student.dtype == dtype
    if not rounded and sampler.dtype != product_dtype(dtype):
        return None
    with torch.autocast("cpu", enabled=False):  # as a rollout is sampled
        if not can_pack(sampler, rows, steps):
            return None
    trained, sampling = decoder_of(student), decoder_of(sampler)
    if trained is None or sampling is None:
        return None
    return _Pair(trained, sampling, dtype)


def _changes(model: nn.Module) -> int:
    """How often weights of a model were written to."""
    return sum(each._version for each in model.parameters() if not each.is_inference())


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Other AVX-512 multiplies bfloat16 no faster than float32.
        return any(
            getattr(torch.cpu, name, bool)()
            for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        )
    return False


def _rounded_copy(model: nn.Module) -> Any:
    """A copy with bfloat16 parameters, rounded one by one: no float32 copy is made on the way.

    Parameters only: rounded rotary frequencies would turn far positions astray.

    Args:
        model: One on a single device.
    """
    # What deepcopy finds in its memo it does not copy.
    memo: dict[int, Any] = {
        id(each): nn.Parameter(each.detach().to(torch.bfloat16, copy=True), requires_grad=False)
        for each in model.parameters()
    }
    return copy.deepcopy(model, memo).eval()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def give_back_memory(device: torch.device) -> None:
    """Return freed memory: to a GPU, and to the system where the C library can (glibc).

    What a rollout has freed lies in pieces between what lives on, and what comes next does not fit
    into them. On a CPU a call takes some hundredths of a second.

    Args:
        device: Where a rollout was sampled.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
