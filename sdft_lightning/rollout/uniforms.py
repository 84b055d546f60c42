"""Random numbers that belong to a row, not to the batch or process in which it is sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def row_key(row_id: str) -> int:
    """A 63-bit number for a row's id, the same on every machine and Python.

    Args:
        row_id: The id of the row.

    Returns:
        Non-negative integer.
    """
    digest = hashlib.blake2b(row_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def row_uniforms(seed: int, step: int, row_ids: Sequence[str], samples: int, length: int) -> Tensor:
    """One uniform number in [0, 1) for each (row, sample, position), drawn from (seed, step, row).

    Counter-based (numpy's Philox), so the numbers of a row depend on nothing but its key: not on
    the batch it stands in, the rank, or what was drawn before.

    Args:
        seed: Seed of the run.
        step: Optimizer step.
        row_ids: B ids.
        samples: Completions of each row.
        length: Longest completion, T.

    Returns:
        `(B · samples, T)` float64 on the CPU.
    """
    numbers = [
        np.random.Generator(
            np.random.Philox(np.random.SeedSequence([seed, step, row_key(row_id), sample]))
        ).random(length)
        for row_id in row_ids
        for sample in range(samples)
    ]
    return torch.from_numpy(np.stack(numbers))  # (B · samples, T)


def row_seeds(seed: int, step: int, row_ids: Sequence[str], samples: int) -> list[int]:
    """One 63-bit seed for each (row, sample), for samplers that take a seed and not the numbers.

    Args:
        seed: Seed of the run.
        step: Optimizer step.
        row_ids: B ids.
        samples: Completions of each row.

    Returns:
        B · samples seeds.
    """
    return [
        int(
            np.random.SeedSequence([seed, step, row_key(row_id), sample]).generate_state(
                1, np.uint64
            )[0]
        )
        >> 1
        for row_id in row_ids
        for sample in range(samples)
    ]
