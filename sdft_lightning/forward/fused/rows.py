"""Tokens of prompts and completions one after another, without padding and each prompt once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.fused.groups import Group, groups_of
from sdft_lightning.forward.prefix import SplitPrompts


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


def token_lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens of rows `(B, L)` without their padding."""
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def prompt_rows(split: SplitPrompts, heads: int) -> PromptRows:
    """Lay out prompts.

    Args:
        split: The prompts, less what all begin with.
        heads: Query heads of the model.
    """
    shared = split.prefix_ids.numel()
    known: dict[tuple[int, ...], int] = {}
    keys = [tuple(row) for row in token_lists(split.rest_ids, split.rest_mask)]
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


def with_completions(
    prompts: PromptRows, completion_ids: Tensor, completion_mask: Tensor, heads: int
) -> FlatRows:
    """Lay out completions behind their prompts; the last token of each is left out.

    Args:
        prompts: B prompts.
        completion_ids: `(B · n, T)`, padded on the right: n of each prompt.
        completion_mask: `(B · n, T)`.
        heads: Query heads of the model.
    """
    count, width = completion_ids.shape
    samples = count // len(prompts.owner)
    owner = [prompt for prompt in prompts.owner for _ in range(samples)]
    lengths = (completion_mask.sum(dim=1) - 1).clamp(min=0).tolist()  # nothing follows the last
    tokens = [prompts.tokens[prompt] for prompt in owner]
    order = sorted(range(count), key=lambda row: (lengths[row], len(tokens[row])))
    first = at = prompts.ids.numel()
    pieces, positions = [prompts.ids], [prompts.positions]
    predicting = torch.zeros(count, width, dtype=torch.long)  # (B · n, T)
    for row in order:
        length, prompt = lengths[row], tokens[row]
        pieces.append(completion_ids[row, :length])
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
