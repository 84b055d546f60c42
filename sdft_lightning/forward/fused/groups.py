"""Which tokens attend together, and to which others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Scores that exist at once, over all heads: 4 MB in float32, which a processor's cache holds.
_MOST_SCORES = 2**20
# Queries that attend at once: later keys are left out of the products of the first ones.
_FEW_QUERIES = 64
# Scores of a padded group over those of its sequences alone.
_SPREAD = 1.25


class Group(NamedTuple):
    """Sequences of about the same length, which attend together.

    A token sees the shared ones, its context, and what of its own sequence came before it.

    Attributes:
        start: Their first token among all.
        end: Behind their last token.
        rows: G sequences.
        length: L tokens of the longest.
        places: Where their tokens are among the G · L of the padded group; None where all are.
        shared: K tokens at the very beginning that all sequences see.
        context: `(G, C)` earlier tokens that a sequence sees besides, padded.
        padding: `(G, C)` -inf where `context` is padding, else 0; None where nothing is.
    """

    start: int
    end: int
    rows: int
    length: int
    places: Tensor | None
    shared: int
    context: Tensor
    padding: Tensor | None

    @property
    def before(self) -> int:
        """K + C keys before a sequence's own."""
        return self.shared + self.context.shape[1]

    def padded(self, tokens: Tensor) -> Tensor:
        """The group's part `(G, L, ...)` of all tokens `(N, ...)`; zeros where there is none."""
        own = tokens[self.start : self.end]
        if self.places is not None:
            buffer = own.new_zeros(self.rows * self.length, *own.shape[1:])
            own = buffer.index_copy_(0, self.places, own)
        return own.view(self.rows, self.length, *own.shape[1:])

    def store(self, tokens: Tensor, padded: Tensor) -> None:
        """The other way: write `(G, L, ...)` into the group's part of `(N, ...)`."""
        own = tokens[self.start : self.end]
        if self.places is None:
            own.view(padded.shape).copy_(padded)
        else:
            own.copy_(padded.flatten(0, 1)[self.places])

    def blocks(self, heads: int) -> Iterator[tuple[slice, int]]:
        """Queries that attend at once, and how many keys they see of K + C + L."""
        step = max(1, _MOST_SCORES // (self.rows * heads * (self.before + self.length)))
        step = min(step, _FEW_QUERIES)
        for first in range(0, self.length, step):
            last = min(first + step, self.length)
            yield slice(first, last), self.before + last


def groups_of(
    lengths: Sequence[int], contexts: Sequence[range], start: int, shared: int, heads: int
) -> list[Group]:
    """Groups of sequences that stand one behind the other; those without a token are in none.

    Args:
        lengths: Tokens of each sequence; neighbours of about the same length share a group.
        contexts: Earlier tokens that each sees besides the shared ones.
        start: First token of the first sequence.
        shared: K tokens that all see.
        heads: Query heads of the model.
    """
    found: list[Group] = []
    done, end = 0, len(lengths)
    while done < end:
        if lengths[done] == 0:
            done += 1
            continue
        last = done + 1
        while last < end and _fit(
            lengths[done : last + 1], contexts[done : last + 1], shared, heads
        ):
            last += 1
        found.append(_group(lengths[done:last], contexts[done:last], start, shared))
        start = found[-1].end
        done = last
    return found


def _fit(lengths: Sequence[int], contexts: Sequence[range], shared: int, heads: int) -> bool:
    """Whether sequences can share a group."""
    before = shared + max(map(len, contexts))
    padded = len(lengths) * max(lengths) * (before + max(lengths))
    own = sum(
        length * (shared + len(context) + length)
        for length, context in zip(lengths, contexts, strict=True)
    )
    return heads * padded <= _MOST_SCORES and padded <= _SPREAD * own


def _group(lengths: Sequence[int], contexts: Sequence[range], start: int, shared: int) -> Group:
    rows, longest, widest = len(lengths), max(lengths), max(map(len, contexts))
    places = None
    if min(lengths) != longest:
        places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)])
    context = torch.zeros(rows, widest, dtype=torch.long)  # (G, C)
    padding = torch.full((rows, widest), float("-inf"), dtype=torch.float32)
    for row, seen in enumerate(contexts):
        context[row, : len(seen)] = torch.arange(seen.start, seen.stop)
        padding[row, : len(seen)] = 0
    is_padded = min(map(len, contexts)) != widest
    end = start + sum(lengths)
    return Group(start, end, rows, longest, places, shared, context, padding if is_padded else None)
