"""Prompts that a rollout has read and the student's pass over the same tokens need not read again.

The weights do not move between them. Only fused decoders leave what is needed, see `fused.prompts`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.fused import (
    Decoder,
    ReadPrompts,
    decoder_of,
    read_prompts,
    training_dtype,
)
from sdft_lightning.forward.prefix import split_if_worth
from sdft_lightning.models.precision import product_dtype
from sdft_lightning.rollout.packed import can_pack

# What may be kept for later micro-batches of a window; the first one's is used at once.
_MOST_BYTES = 3 * 2**28

Prompts = tuple[Tensor, Tensor]  # ids and mask (B, P), padded on the left


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
        prompts: Sequence[tuple[Hashable, Prompts]],
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
        for key, (ids, mask) in prompts:
            needed = each * int(mask.sum())
            keep = not found or (room >= needed and len(self._kept) == len(found))
            split = split_if_worth(ids, mask)
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
