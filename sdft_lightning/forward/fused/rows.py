"""Tokens of prompts and completions one after another, without padding and each prompt once.

`groups_of` decides which of their sequences attend together, and to which other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.layout import SplitPrompts
from sdft_lightning.types import Tokens

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


class PromptRows(NamedTuple):
    """All tokens of some prompts; equal prompts are one.

    Attributes:
        ids: `(M,)` the shared prefix, then prompt after prompt, the shortest first.
        positions: `(M,)`.
        groups: All of it, in order.
        shared: K tokens of the prefix.
        tokens: Where the tokens of each prompt are, less the prefix.
        owner: Which prompt each of the B rows has.
    """

    ids: Tensor
    positions: Tensor
    groups: list[Group]
    shared: int
    tokens: list[range]
    owner: list[int]

    @property
    def last(self) -> Tensor:
        """`(B,)` the last token of each row's prompt."""
        return torch.tensor([self.tokens[prompt].stop - 1 for prompt in self.owner])

    def token_lists(self) -> list[list[int]]:
        """The tokens of each row's prompt, the prefix included."""
        ids = self.ids.tolist()
        own = [ids[: self.shared] + ids[each.start : each.stop] for each in self.tokens]
        return [own[prompt] for prompt in self.owner]

    @property
    def width(self) -> int:
        """Tokens of the longest prompt, the prefix included."""
        return self.shared + max(map(len, self.tokens))

    def padded(self, width: int) -> tuple[Tensor, Tensor]:
        """Which tokens each row's prompt consists of `(B, width)`, padded on the left; a mask."""
        order = torch.zeros(len(self.owner), width, dtype=torch.long)  # (B, L)
        mask = torch.zeros(order.shape, dtype=torch.bool)  # (B, L)
        for row, prompt in enumerate(self.owner):
            tokens = torch.tensor([*range(self.shared), *self.tokens[prompt]])
            order[row, width - tokens.numel() :] = tokens
            mask[row, width - tokens.numel() :] = True
        return order, mask


class FlatRows(NamedTuple):
    """All tokens of a batch: its prompts, then its completions.

    Attributes:
        ids: `(N,)`.
        positions: `(N,)`.
        prompts: M tokens of the prompts, the first ones.
        groups: All of it, in order.
        predicting: `(B, T)` the token that predicts each one of a completion; anything where a
            completion has ended.
    """

    ids: Tensor
    positions: Tensor
    prompts: int
    groups: list[Group]
    predicting: Tensor


def prompt_rows(split: SplitPrompts, heads: int) -> PromptRows:
    """Lay out prompts.

    Args:
        split: The prompts, less what all begin with.
        heads: Query heads of the model.
    """
    shared = split.prefix_ids.numel()
    known: dict[tuple[int, ...], int] = {}
    keys = [tuple(row) for row in split.rest.lists()]
    for key in sorted(keys, key=len):
        known.setdefault(key, len(known))
    tokens: list[range] = []
    pieces, positions = [split.prefix_ids], [torch.arange(shared)]
    at = shared
    for key in known:
        tokens.append(range(at, at + len(key)))
        pieces.append(torch.tensor(key, dtype=torch.long))
        positions.append(torch.arange(len(key)) + shared)
        at += len(key)
    groups = groups_of([shared], [range(0)], 0, 0, heads)
    nothing = [range(0)] * len(tokens)
    groups += groups_of([len(each) for each in tokens], nothing, shared, shared, heads)
    owner = [known[key] for key in keys]
    return PromptRows(torch.cat(pieces), torch.cat(positions), groups, shared, tokens, owner)


def stored_rows(lengths: Sequence[int], owner: list[int]) -> PromptRows:
    """Prompts that are not computed: only what completions behind them need to know.

    Args:
        lengths: Tokens of each prompt.
        owner: Which prompt each of the B rows has.
    """
    ends = list(accumulate(lengths))
    tokens = [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    nothing = torch.zeros(sum(lengths), dtype=torch.long)  # (M,)
    return PromptRows(nothing, nothing, [], 0, tokens, owner)


def with_completions(prompts: PromptRows, completions: Tokens, heads: int) -> FlatRows:
    """Lay out completions behind their prompts; the last token of each is left out.

    Args:
        prompts: B prompts.
        completions: `(B · n, T)`, padded on the right: n of each prompt.
        heads: Query heads of the model.
    """
    count, width = completions.ids.shape
    samples = count // len(prompts.owner)
    owner = [prompt for prompt in prompts.owner for _ in range(samples)]
    lengths = (completions.mask.sum(dim=1) - 1).clamp(min=0).tolist()  # nothing follows the last
    tokens = [prompts.tokens[prompt] for prompt in owner]
    order = sorted(range(count), key=lambda row: (lengths[row], len(tokens[row])))
    first = at = prompts.ids.numel()
    pieces, positions = [prompts.ids], [prompts.positions]
    predicting = torch.zeros(count, width, dtype=torch.long)  # (B · n, T)
    for row in order:
        length, prompt = lengths[row], tokens[row]
        pieces.append(completions.ids[row, :length])
        positions.append(torch.arange(length) + prompts.shared + len(prompt))
        predicting[row, 0] = prompt.stop - 1
        predicting[row, 1 : length + 1] = torch.arange(at, at + length)
        at += length
    groups = groups_of(
        [lengths[row] for row in order],
        [tokens[row] for row in order],
        first,
        prompts.shared,
        heads,
    )
    return FlatRows(
        torch.cat(pieces), torch.cat(positions), first, [*prompts.groups, *groups], predicting
    )
