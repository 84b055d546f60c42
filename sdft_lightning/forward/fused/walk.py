"""Rows of large tensors a few at a time, so that what is made of them stays in a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

# Numbers of the rows that are walked over at once: 1 MB in float32.
_NUMBERS = 2**18


def walk(parts: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of tensors `(N_i, C)` that stand for one `(N, C)`, and which rows of it they are.

    Args:
        parts: One behind the other.
    """
    start = 0
    for part in parts:
        if part.shape[0] == 0:
            continue
        for piece in part.split(max(1, _NUMBERS // part.shape[1])):
            yield slice(start, start + piece.shape[0]), piece
            start += piece.shape[0]
