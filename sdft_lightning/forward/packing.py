"""Prompts with their completions side by side in fewer rows, so that little is padded.

Several sequences stand one after another in a row. The attention mask keeps them blind to each
other, and positions start anew with each, so results equal the padded batch up to rounding. The
last token of a completion is left out: nothing is predicted from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.prefix import SplitPrompts

# Rows may grow to this many tokens: longer ones pack better, and pay it back in attention.
WIDTH = 256
# Packed only where it saves at least this part of the tokens.
_WORTH = 0.1
_PADDING = -1


class PackedRows(NamedTuple):
    """B sequences in G rows of L columns.

    Attributes:
        ids: `(G, L)` tokens.
        sequence: `(G, L)` which of the B sequences a column belongs to, `_PADDING` for none.
        positions: `(G, L)` counted anew in each sequence.
        row: `(B,)` row of each sequence.
        first: `(B,)` column that predicts the first token of each completion.
    """

    ids: Tensor
    sequence: Tensor
    positions: Tensor
    row: Tensor
    first: Tensor


def pack_if_worth(
    split: SplitPrompts, completion_ids: Tensor, completion_mask: Tensor
) -> PackedRows | None:
    """Lay sequences out side by side, or return None where that saves too little.

    Args:
        split: The prompts, less what all begin with.
        completion_ids: `(B, T)`, padded on the right.
        completion_mask: `(B, T)`.
    """
    lengths = _lengths(split, completion_mask)
    padded = len(lengths) * (split.rest_ids.shape[1] + completion_ids.shape[1] - 1)
    bins = _fill_bins(lengths, max(max(lengths), min(WIDTH, sum(lengths))))
    width = max(sum(lengths[index] for index in group) for group in bins)
    if len(bins) * width > (1 - _WORTH) * padded:
        return None
    return _lay_out(split, completion_ids, lengths, bins)


def one_a_row(split: SplitPrompts, completion_ids: Tensor, completion_mask: Tensor) -> PackedRows:
    """Lay each sequence out from column 0, padded behind its end.

    Arguments as of `pack_if_worth`.
    """
    lengths = _lengths(split, completion_mask)
    return _lay_out(split, completion_ids, lengths, [[index] for index in range(len(lengths))])


def _lengths(split: SplitPrompts, completion_mask: Tensor) -> list[int]:
    """Tokens of each sequence, without the last of its completion."""
    inputs = (completion_mask.sum(dim=1) - 1).clamp(min=0)  # (B,)
    lengths: list[int] = (split.rest_mask.sum(dim=1) + inputs).tolist()
    return lengths


def _lay_out(
    split: SplitPrompts, completion_ids: Tensor, lengths: list[int], bins: list[list[int]]
) -> PackedRows:
    width = max(sum(lengths[index] for index in group) for group in bins)
    device = completion_ids.device
    shape = (len(bins), width)
    ids = torch.zeros(shape, dtype=torch.long, device=device)  # (G, L)
    sequence = torch.full(shape, _PADDING, device=device)  # (G, L)
    positions = torch.zeros(shape, dtype=torch.long, device=device)  # (G, L)
    row = torch.zeros(len(lengths), dtype=torch.long, device=device)  # (B,)
    first = torch.zeros(len(lengths), dtype=torch.long, device=device)  # (B,)
    for group, members in enumerate(bins):
        start = 0
        for index in members:
            columns = slice(start, start + lengths[index])
            prompt = split.rest_ids[index][split.rest_mask[index]]  # (P_i,)
            tokens = completion_ids[index, : lengths[index] - prompt.numel()]  # (T_i - 1,)
            ids[group, columns] = torch.cat([prompt, tokens])
            sequence[group, columns] = index
            positions[group, columns] = torch.arange(lengths[index], device=device)
            row[index], first[index] = group, start + prompt.numel() - 1
            start += lengths[index]
    return PackedRows(ids, sequence, positions, row, first)


def own_sequence(sequence: Tensor) -> Tensor:
    """Which keys each query sees `(G, L, L)`: what came before of its own sequence.

    Padding counts as a sequence, so that no query is blind.

    Args:
        sequence: `(G, L)`.
    """
    order = torch.arange(sequence.shape[1], device=sequence.device)  # (L,)
    causal = order.unsqueeze(0) <= order.unsqueeze(1)  # (L, L) query, key
    return causal & (sequence.unsqueeze(1) == sequence.unsqueeze(2))  # (G, L, L)


def attention_mask(seen: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """A mask as transformers takes it, `(G, 1, L, K + L)`, to be added to attention scores.

    Args:
        seen: `(G, L, L)` which keys each query sees.
        shared: K tokens before them that everyone sees.
        dtype: Of the attention scores.
    """
    scores = torch.zeros(seen.shape, dtype=dtype, device=seen.device)  # (G, L, L)
    scores.masked_fill_(~seen, torch.finfo(dtype).min)
    return torch.nn.functional.pad(scores, (shared, 0)).unsqueeze(1)


def unpack(hidden: Tensor, rows: PackedRows, keep: Tensor) -> Tensor:
    """The states that predict the kept completion tokens, sequence by sequence.

    Args:
        hidden: `(G, L, D)`.
        rows: Where the sequences are.
        keep: `(B, T)`.

    Returns:
        `(N, D)`.
    """
    steps = torch.arange(keep.shape[1], device=keep.device)  # (T,)
    columns = rows.first.unsqueeze(1) + steps  # (B, T)
    groups = rows.row.unsqueeze(1).expand_as(columns)  # (B, T)
    return hidden[groups[keep], columns[keep]]  # (N, D)


def _fill_bins(lengths: list[int], width: int) -> list[list[int]]:
    """First fit, longest first: indices of the sequences of each row."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((i for i, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(width)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins
