"""Sampling completions with a transformers model, row by row independent of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdft_lightning.errors import UserError
from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.fused import ReadPrompts
from sdft_lightning.rollout.decode import prefill
from sdft_lightning.rollout.decode_mode import decode_mode
from sdft_lightning.rollout.sampling import Sampling, StopTexts, choose_tokens, on_device
from sdft_lightning.types import Rollout, Tokens

# Finished rows are dropped from the batch when at least this fraction of it is finished.
_COMPACT_AT = 0.25


class RolloutRequest(NamedTuple):
    """What is to be sampled.

    Attributes:
        prompts: `(B, P)`, padded on the left.
        row_ids: B ids; random numbers belong to them.
        sampling: Temperature, truncation, length, completions per prompt (n).
        seed: Seed of the run.
        step: Optimizer step; the weights are those of this step.
        stop_ids: Ids of which any ends a completion; it is part of the completion.
        pad_id: Id that fills the rest of a row.
        longest: Longest completion of each of the B prompts, where they differ; at most that of
            `sampling`.
    """

    prompts: Tokens
    row_ids: list[str]
    sampling: Sampling
    seed: int
    step: int
    stop_ids: list[int]
    pad_id: int
    longest: list[int] | None = None

    @property
    def limits(self) -> list[int]:
        """Longest of each of the R = B · n completions."""
        longest = self.longest or [self.sampling.max_new_tokens] * len(self.row_ids)
        return [most for most in longest for _ in range(self.sampling.completions_per_prompt)]


def join_requests(requests: Sequence[RolloutRequest]) -> RolloutRequest:
    """One request for the rows of several, whose prompts are padded further on the left.

    Args:
        requests: Alike but for their rows and the length of their completions.
    """
    prompts = [request.prompts for request in requests]
    longest = max(part.ids.shape[1] for part in prompts)
    joined = Tokens(
        torch.cat([pad(part.ids, (longest - part.ids.shape[1], 0)) for part in prompts]),
        torch.cat([pad(part.mask, (longest - part.mask.shape[1], 0)) for part in prompts]),
    )  # (ΣB, P)
    row_ids = [row_id for request in requests for row_id in request.row_ids]
    limits = [each.sampling.max_new_tokens for each in requests for _ in each.row_ids]
    sampling = replace(requests[0].sampling, max_new_tokens=max(limits))
    return requests[0]._replace(prompts=joined, row_ids=row_ids, sampling=sampling, longest=limits)


def split_rollout(rollout: Rollout, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    """The rollout of each of several joined requests, as long as its longest completion."""
    rows = [len(each.row_ids) * each.sampling.completions_per_prompt for each in requests]
    parts = []
    for piece in zip(*(tensor.split(rows) for tensor in rollout), strict=True):
        part = Rollout(*piece)
        length = int(part.completion_mask.sum(dim=1).max())
        parts.append(
            Rollout(
                part.completion_ids[:, :length],
                part.completion_mask[:, :length],
                part.sampled_log_probs[:, :length],
                part.truncated,
            )
        )
    return parts


def greedy_rollout(
    model: Any,
    prompts: Tokens,
    max_new_tokens: int,
    stop_ids: list[int],
    pad_id: int,
    stop_texts: StopTexts | None = None,
) -> Rollout:
    """The likeliest completion of each prompt, token by token; see `generate_rollout`."""
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return generate_rollout(model, prompts, sampling, None, stop_ids, pad_id, stop_texts)


@torch.no_grad()
def generate_rollout(
    model: Any,
    prompts: Tokens,
    sampling: Sampling,
    uniforms: Tensor | None,
    stop_ids: list[int],
    pad_id: int,
    stop_texts: StopTexts | None = None,
    read: list[ReadPrompts] | None = None,
    limits: list[int] | None = None,
) -> Rollout:
    """Sample completions; the model is in eval mode meanwhile.

    Each token is the inverse CDF at the uniform number of its (row, position), so a row's
    completion does not depend on the batch around it (up to floating-point ties).

    Args:
        model: A causal language model of transformers.
        prompts: `(B, P)`, padded on the left.
        sampling: Temperature, truncation, length, completions per prompt (n).
        uniforms: `(B · n, max_new_tokens)` in [0, 1), see `sampling.row_uniforms`; None samples
            greedily.
        stop_ids: Ids of which any ends a completion; it is part of the completion.
        pad_id: Id that fills the rest of a row.
        stop_texts: Texts that end a completion besides; the tokens that hold them are kept.
        read: The same prompts, read by the same weights, in one piece or several; its keys and
            values are dropped.
        limits: Longest of each of the B · n completions; that of `sampling` without it.

    Returns:
        The rollout, as long as its longest completion.

    Raises:
        UserError: If the model's logits are no numbers.
    """
    paths_of(model)  # found out before anything of the model is changed for decoding
    samples = sampling.completions_per_prompt
    rows = prompts.ids.shape[0] * samples
    found = _Completions(
        rows, sampling.max_new_tokens, stop_ids, pad_id, limits, prompts.ids.device
    )
    if uniforms is not None:
        uniforms = on_device(
            uniforms, prompts.ids.device
        )  # once, as each copy waits for the device
    with decode_mode(model, rows, sampling.max_new_tokens) as fused:
        prompts = Tokens(prompts.ids, prompts.mask.bool())
        decoding = prefill(model, prompts, samples, sampling.max_new_tokens, fused, read)
        logits = decoding.logits  # (S, V)
        for step in range(sampling.max_new_tokens):
            numbers = None if uniforms is None else uniforms[found.rows, step]  # (S,)
            tokens = found.add(*choose_tokens(logits, sampling, numbers), stop_texts)  # (S,)
            going = found.count_going()
            if going == 0:
                break
            if decoding.drops_rows and going <= (1 - _COMPACT_AT) * len(tokens):
                slots = found.compact(going)  # (A,)
                decoding.keep(slots)
                tokens = tokens[slots]  # (A,)
            logits = decoding.step(tokens)  # (S, V)
        decoding.finish(Tokens(*found.tokens()))
    _check_finite(found.log_probs)
    return Rollout(*found.tokens(), found.log_probs[:, : found.length], found.truncated)


class _Completions:
    """R growing completions, and the S of them that are still in the batch, each in a slot.

    Finished rows stay in the batch until enough of them can be dropped at once, or to the end where
    the model's cache cannot drop any. What is decided about rows is computed where they are: the
    host asks only how many go on, once a token, and nothing else waits for the device.

    Args:
        rows: R.
        longest: Most tokens of a completion.
        stop_ids: Ids of which any ends a completion.
        pad_id: Id that fills the rest of a row.
        limits: Longest of each completion; `longest` without it.
        device: Where the model is.

    Attributes:
        rows: `(S,)` which of the completions is in which slot.
        log_probs: `(R, longest)` of the tokens.
        truncated: `(R,)` completions that were cut off.
        length: Tokens of the longest completion so far.
    """

    def __init__(
        self,
        rows: int,
        longest: int,
        stop_ids: list[int],
        pad_id: int,
        limits: list[int] | None,
        device: torch.device,
    ) -> None:
        shape, self.length = (rows, longest), 0
        self._ids = torch.full(shape, pad_id, dtype=torch.long, device=device)  # (R, T)
        self._mask = torch.zeros(shape, dtype=torch.bool, device=device)  # (R, T)
        self.log_probs = torch.zeros(shape, dtype=torch.float32, device=device)
        self.truncated = torch.zeros(rows, dtype=torch.bool, device=device)
        self.rows = torch.arange(rows, device=device)
        self._pad = pad_id
        self._going = torch.ones(rows, dtype=torch.bool, device=device)  # (S,)
        self._stops = torch.tensor(stop_ids, dtype=torch.long, device=device)  # (E,)
        self._limits = torch.tensor(limits or [longest] * rows, device=device)  # (R,)

    def add(self, tokens: Tensor, log_probs: Tensor, stop_texts: StopTexts | None) -> Tensor:
        """Append a token to each row that goes on, and see which of them end with it.

        Args:
            tokens: `(S,)`.
            log_probs: `(S,)` of these tokens.
            stop_texts: Texts that end a completion; to look for them the host waits twice more.

        Returns:
            `(S,)` what is to be appended: the tokens, and 0 in rows that have ended.
        """
        going, step = self._going, self.length
        self._ids[self.rows, step] = tokens.where(going, self._pad)
        self._mask[self.rows, step] = going
        self.log_probs[self.rows, step] = log_probs.where(going, 0.0)
        self.length = step + 1
        ended = (tokens.unsqueeze(1) == self._stops).any(dim=1)  # (S,)
        if stop_texts is not None:
            ended |= stop_texts.found(self._ids[self.rows, : self.length])
        cut = going & ~ended & (self._limits[self.rows] == self.length)  # (S,)
        self.truncated[self.rows] |= cut
        self._going = going & ~ended & ~cut
        return tokens.where(self._going, 0)

    def count_going(self) -> int:
        """How many rows go on; the one question a token for which the host waits."""
        return int(self._going.sum())

    def compact(self, count: int) -> Tensor:
        """Drop the slots of finished rows.

        Args:
            count: How many rows go on.

        Returns:
            `(count,)` the slots that are left, ascending.
        """
        slots = (~self._going).long().argsort(stable=True)[:count]  # those that go on come first
        self.rows, self._going = self.rows[slots], self._going[slots]
        return slots

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Ids and mask `(R, length)`."""
        return self._ids[:, : self.length], self._mask[:, : self.length]


def _check_finite(log_probs: Tensor) -> None:
    """Refuse completions `(R, T)` of a model that has diverged; asked once, not a token."""
    broken = int((~log_probs.isfinite()).any(dim=1).sum())
    if broken:
        raise UserError(
            f"rollout: the model's logits are not finite (NaN or infinity) in {broken} of "
            f"{log_probs.shape[0]} completions. Its weights have diverged, or the precision "
            "overflows. Go on from an earlier checkpoint (--ckpt_path) with a lower learning rate "
            "(--model.optimizer.init_args.lr), or set --trainer.precision to bf16-mixed or 32-true."
        )
