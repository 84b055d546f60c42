"""Tokens of several sequences one after another without padding, and how attention groups them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sdft_lightning.prefix import SplitPrompts

# Scores that exist at once, over all heads: 4 MB in float32, which a processor's cache holds.
_MOST_SCORES = 2**20
# Queries that attend at once: later keys are left out of the products of the first ones.
_FEW_QUERIES = 64
# The longest sequence of a group over its shortest, less what is shared.
_SPREAD = 1.25


class Group(NamedTuple):
    """Sequences of about the same length, which attend together.

    Attributes:
        start: Their first token among all.
        end: Behind their last token.
        rows: G sequences.
        length: L tokens of the longest.
        places: Where their tokens are among the G · L of the padded group; None where all are.
        shared: K tokens at the very beginning that they see besides, as all sequences do.
    """

    start: int
    end: int
    rows: int
    length: int
    places: Tensor | None
    shared: int

    def padded(self, tokens: Tensor) -> Tensor:
        """The group's part `(G, L, ...)` of all tokens `(N, ...)`; zeros where there is none."""
        own = tokens[self.start : self.end]
        if self.places is not None:
            room = own.new_zeros(self.rows * self.length, *own.shape[1:])
            own = room.index_copy_(0, self.places, own)
        return own.view(self.rows, self.length, *own.shape[1:])

    def store(self, tokens: Tensor, padded: Tensor) -> None:
        """The other way: write `(G, L, ...)` into the group's part of `(N, ...)`."""
        own = tokens[self.start : self.end]
        if self.places is None:
            own.view(padded.shape).copy_(padded)
        else:
            own.copy_(padded.flatten(0, 1)[self.places])

    def blocks(self, heads: int) -> Iterator[tuple[slice, int]]:
        """Queries that attend at once, and how many keys they see of K + L."""
        step = max(1, _MOST_SCORES // (self.rows * heads * (self.shared + self.length)))
        step = min(step, _FEW_QUERIES)
        for first in range(0, self.length, step):
            last = min(first + step, self.length)
            yield slice(first, last), self.shared + last


class FlatRows(NamedTuple):
    """All tokens of a batch.

    Attributes:
        ids: `(N,)` the shared prefix, then sequence after sequence, the shortest first.
        positions: `(N,)`.
        groups: All of it, in order.
        first: `(B,)` the token that predicts the first one of each completion.
    """

    ids: Tensor
    positions: Tensor
    groups: list[Group]
    first: Tensor


def flat_rows(
    split: SplitPrompts, completion_ids: Tensor, completion_mask: Tensor, heads: int
) -> FlatRows:
    """Lay out prompts with their completions; the last token of each is left out.

    Args:
        split: The prompts, less what all begin with.
        completion_ids: `(B, T)`, padded on the right.
        completion_mask: `(B, T)`.
        heads: Query heads of the model.
    """
    prompts = split.rest_mask.sum(dim=1).tolist()
    inputs = (completion_mask.sum(dim=1) - 1).clamp(min=0).tolist()  # nothing follows the last
    lengths = [prompt + more for prompt, more in zip(prompts, inputs, strict=True)]
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    shared = split.prefix_ids.numel()
    pieces = [split.prefix_ids]
    positions = [torch.arange(shared)]
    first = [0] * len(lengths)
    at = shared
    for row in order:
        pieces += [split.rest_ids[row][split.rest_mask[row]], completion_ids[row, : inputs[row]]]
        positions.append(torch.arange(lengths[row]) + shared)
        first[row] = at + prompts[row] - 1
        at += lengths[row]
    groups = [Group(0, shared, 1, shared, None, 0)] if shared else []
    groups += _groups([lengths[row] for row in order], shared, heads)
    return FlatRows(torch.cat(pieces), torch.cat(positions), groups, torch.tensor(first))


def _groups(lengths: list[int], shared: int, heads: int) -> Iterator[Group]:
    """Groups of sequences whose ascending lengths are given, behind `shared` tokens."""
    start, done = shared, 0
    while done < len(lengths):
        last = done + 1
        while last < len(lengths):
            longest = lengths[last]
            scores = (last + 1 - done) * heads * longest * (shared + longest)
            if scores > _MOST_SCORES or longest > _SPREAD * lengths[done]:
                break
            last += 1
        own = lengths[done:last]
        longest, end = own[-1], start + sum(own)
        places = None
        if own[0] != longest:
            places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(own)])
        yield Group(start, end, len(own), longest, places, shared)
        start, done = end, last
