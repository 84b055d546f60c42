"""The student's weights to sample with, and what sampling has read for the student's own pass."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from sdft_lightning.forward.fused import (
    Decoder,
    ReadPrompts,
    decoder_of,
    join_,
    read_prompts,
    training_dtype,
)
from sdft_lightning.forward.layout import split_if_worth
from sdft_lightning.models.products import product_dtype
from sdft_lightning.models.sharding import empty_copy, fill_, is_sharded
from sdft_lightning.rollout.decode_mode import can_pack
from sdft_lightning.types import Tokens

SamplingDtype = Literal["auto", "same", "bfloat16"]


class SamplingWeights:
    """Keeps a bfloat16 copy of a model and refreshes it when the model has moved.

    The copy is no part of any module: it is never trained, moved or saved. Of a model that is
    spread over processes a whole copy is kept in any case: each process samples until its own rows
    are finished, and cannot wait for the others at every token.

    Args:
        dtype: same samples with the trained weights, bfloat16 with a copy, which only costs memory
            where bfloat16 is not multiplied (see `products`); auto takes the copy where the
            hardware multiplies bfloat16 natively and the weights are float32.
    """

    def __init__(self, dtype: SamplingDtype = "auto") -> None:
        self.dtype = dtype
        self._copy: Any = None
        self._version: object = None
        self._empty: Any = None

    def prepare(self, student: nn.Module) -> None:
        """Remember the form of a model that is about to be spread over processes."""
        self._copy, self._empty = None, empty_copy(student)

    def model(self, student: Any, version: object) -> Any:
        """The model to sample with.

        Args:
            student: The trained model.
            version: Anything that changes whenever the weights do, e.g. the optimizer step.

        Returns:
            `student` itself or its up-to-date copy in eval mode. Of a model that is spread over
            processes all must ask for a new version at the same time.
        """
        if is_sharded(student):
            return self._whole(student, version)
        if not self.uses_copy(student):
            return student
        if self._copy is None or _device(self._copy) != _device(student):
            # Never as inference tensors, or the copy could not be refreshed later.
            with torch.inference_mode(False), torch.no_grad():
                self._copy = copy.deepcopy(student).eval().requires_grad_(False)
                # Parameters only: rounded rotary frequencies would turn far positions astray.
                for parameter in self._copy.parameters():
                    parameter.data = parameter.data.to(torch.bfloat16)
                join_(self._copy)
            self._version = version
        elif version != self._version:
            with torch.inference_mode(False), torch.no_grad():
                for target, source in zip(
                    self._copy.parameters(), student.parameters(), strict=True
                ):
                    if source.requires_grad:  # all else stays, e.g. below adapters
                        target.copy_(source)
            self._version = version
        return self._copy

    def rounded(self, student: nn.Module, version: object) -> Any:
        """The bfloat16 copy as it was last asked for, if it is still the student; else None.

        Args:
            student: The trained model.
            version: As of `model`.
        """
        current = version == self._version and not is_sharded(student)
        return self._copy if current and self.uses_copy(student) else None

    @property
    def holds_copy(self) -> bool:
        """Whether there is a copy, of whatever version."""
        return self._copy is not None

    def _whole(self, student: nn.Module, version: object) -> Any:
        if self._copy is None or version != self._version:
            with torch.inference_mode(False):
                whole = copy.deepcopy(self._empty) if self._copy is None else self._copy
                fill_(whole, student, torch.bfloat16 if self.uses_copy(student) else None)
                self._copy = whole.to(_device(student))  # the buffers
            self._version = version
        return self._copy

    def uses_copy(self, student: nn.Module) -> bool:
        """Whether this model is sampled from a bfloat16 copy on its device."""
        if self.dtype == "same" or next(student.parameters()).dtype != torch.float32:
            return False
        if getattr(student, "is_quantized", False):
            return False  # its layers read 4 bits and nothing else
        return self.dtype == "bfloat16" or has_native_bfloat16(_device(student))

    def forget(self) -> None:
        """Drop the copy, e.g. after weights were loaded."""
        self._copy = None


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


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


# What may be kept for later micro-batches of a window; the first one's is used at once.
_MOST_BYTES = 3 * 2**28


class _Pair(NamedTuple):
    """The student and what it is sampled with, as decoders; and the dtype that both keep."""

    student: Decoder
    sampler: Decoder
    dtype: torch.dtype


class SharedPrompts:
    """Keeps what was read of the prompts of each micro-batch until it is asked for."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, ReadPrompts] = {}
        self._weights = 0

    def read(
        self,
        student: Any,
        sampler: Any,
        prompts: Sequence[tuple[Hashable, Tokens]],
        samples: int,
        steps: int,
    ) -> list[ReadPrompts] | None:
        """Read the prompts of a window, to sample from, and keep what the student needs of them.

        Of what was kept before nothing is left.

        Args:
            student: The model that is trained.
            sampler: The model that samples: the student itself, or its copy of this step.
            prompts: A key and the prompts of each micro-batch.
            samples: Completions of each prompt.
            steps: Longest completion.

        Returns:
            The prompts, in order; None where student and sampler do not compute them alike, or
            the rollout is one that fused decoding steps are not used for.
        """
        self.forget()
        rows = samples * sum(ids.shape[0] for _, (ids, _) in prompts)
        pair = _pair(student, sampler, rows, steps)
        if pair is None:
            return None
        self._weights = _changes(student)
        found: list[ReadPrompts] = []
        room, each = _MOST_BYTES, 0.0  # bytes left, bytes of a token
        for key, tokens in prompts:
            needed = each * int(tokens.mask.sum())
            keep = not found or (room >= needed and len(self._kept) == len(found))
            split = split_if_worth(tokens)
            part = read_prompts(pair.student, split, pair.dtype, pair.sampler, keep)
            if keep:
                self._kept[key] = part
                room -= part.nbytes if found else 0
                each = part.nbytes / part.rows.ids.numel()
            found.append(part)
        return found

    def take(self, key: Hashable, student: Any) -> ReadPrompts | None:
        """What was kept of a micro-batch, once; None where there is nothing, or it is void.

        Args:
            key: As of `read`.
            student: As of `read`; void is what other weights have computed.
        """
        found = self._kept.pop(key, None)
        if found is None or self._weights != _changes(student):
            return None
        return found

    def forget(self) -> None:
        """Drop everything, e.g. after weights were loaded."""
        self._kept = {}


def _changes(model: Any) -> int:
    """How often weights of a model were written to."""
    return sum(parameter._version for parameter in model.parameters())


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


def give_back_memory() -> None:
    """Return freed memory to the system where the C library can (glibc); else do nothing.

    What a rollout has freed lies in pieces between what lives on, and what comes next does not fit
    into them. A call takes some hundredths of a second.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
