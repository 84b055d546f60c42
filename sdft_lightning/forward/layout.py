"""How a batch of prompts and completions is laid out, so that little is computed twice or padded.

Chat templates open every prompt with the same system turn. Its keys and values are formed at batch
size 1 and repeated; gradients flow through the repetition. `SHORTEST` and `can_share` say where.

Behind it, several sequences stand one after another in a row. The attention mask separates them,
and positions start anew with each. The last token of a completion is left out: nothing is predicted
from it. Results equal those of the padded batch up to rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.forward_paths import paths_of, sees_all_before
from sdft_lightning.forward.kv_cache import cache_of
from sdft_lightning.models.sharding import is_sharded
from sdft_lightning.types import Tokens

# Below this many shared tokens an extra forward pass is not worth its overhead.
SHORTEST = 8


class SplitPrompts(NamedTuple):
    """Prompts as a prefix that all rows share, and the rest of each.

    Attributes:
        prefix_ids: `(K,)`.
        rest: `(B, R)`, padded on the left; every row has at least one token.
    """

    prefix_ids: Tensor
    rest: Tokens

    @staticmethod
    def whole(prompts: Tokens) -> SplitPrompts:
        """Prompts without a prefix."""
        return SplitPrompts(prompts.ids[0, :0], prompts)


def can_share(model: Any) -> bool:
    """Whether what rows begin with can be computed apart for this model.

    Where `forward_paths` found so. Not with gradient checkpointing (it does without a cache), with
    a sliding window (its cache drops keys), or with attention kernels that want unbroken rows. Nor
    where parameters are spread over processes: one whose prompts share nothing would make a pass
    less than the others, which would wait for it for ever.
    """
    recomputes = model.training and _checkpoints_activations(model)
    shares = sees_all_before(model) and paths_of(model).shares_prefix
    return shares and not recomputes and not is_sharded(model)


def takes_own_mask(model: Any) -> bool:
    """Whether the model's attention takes a mask of its user's own, the same one in all layers."""
    return sees_all_before(model) and paths_of(model).packs


def _checkpoints_activations(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def split_prompts(prompts: Tokens) -> SplitPrompts:
    """Cut off the longest prefix that all rows share, leaving each row one token at least.

    Args:
        prompts: `(B, P)`, padded on the left.
    """
    ids, mask = prompts
    width = ids.shape[1]
    lengths = mask.sum(dim=1)  # (B,)
    shift = (width - lengths).unsqueeze(1)  # (B, 1)
    columns = torch.arange(width, device=ids.device)  # (P,)
    aligned = ids.gather(1, (columns + shift).clamp(max=width - 1))  # (B, P) from column 0
    same = (aligned == aligned[:1]).all(dim=0)  # (P,)
    same &= columns < lengths.min() - 1
    prefix = int(same.long().cumprod(dim=0).sum())
    longest = int(lengths.max()) - prefix
    kept = columns[-longest:] >= shift + prefix  # (B, R) the right end, less the prefix
    return SplitPrompts(aligned[0, :prefix], Tokens(ids[:, -longest:], kept))


def split_if_worth(prompts: Tokens) -> SplitPrompts:
    """Split off the prefix that all prompts share, where a pass of its own pays.

    Args:
        prompts: `(B, P)`, padded on the left.
    """
    if prompts.ids.shape[0] > 1:
        found = split_prompts(prompts)
        if found.prefix_ids.numel() >= SHORTEST:
            return found
    return SplitPrompts.whole(prompts)


def encode_prefix(model: Any, prefix_ids: Tensor, rows: int) -> Any:
    """Keys and values of the prefix for so many rows.

    Args:
        model: A causal language model of transformers.
        prefix_ids: `(K,)`.
        rows: B.

    Returns:
        A cache of transformers with K positions of B rows.
    """
    cache = cache_of(model.base_model(input_ids=prefix_ids.unsqueeze(0), use_cache=True))
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    return cache


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


def pack_if_worth(split: SplitPrompts, completions: Tokens) -> PackedRows | None:
    """Lay sequences out side by side, or return None where that saves too little.

    Args:
        split: The prompts, less what all begin with.
        completions: `(B, T)`, padded on the right.
    """
    lengths = _lengths(split, completions)
    padded = len(lengths) * (split.rest.ids.shape[1] + completions.ids.shape[1] - 1)
    bins = _fill_bins(lengths, max(max(lengths), min(WIDTH, sum(lengths))))
    width = max(sum(lengths[index] for index in group) for group in bins)
    if len(bins) * width > (1 - _WORTH) * padded:
        return None
    return _lay_out(split, completions, lengths, bins)


def one_a_row(split: SplitPrompts, completions: Tokens) -> PackedRows:
    """Lay each sequence out from column 0, padded behind its end.

    Arguments as of `pack_if_worth`.
    """
    lengths = _lengths(split, completions)
    return _lay_out(split, completions, lengths, [[index] for index in range(len(lengths))])


def _lengths(split: SplitPrompts, completions: Tokens) -> list[int]:
    """Tokens of each sequence, without the last of its completion."""
    inputs = (completions.mask.sum(dim=1) - 1).clamp(min=0)  # (B,)
    lengths: list[int] = (split.rest.mask.sum(dim=1) + inputs).tolist()
    return lengths


def _lay_out(
    split: SplitPrompts, completions: Tokens, lengths: list[int], bins: list[list[int]]
) -> PackedRows:
    width = max(sum(lengths[index] for index in group) for group in bins)
    device = completions.ids.device
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
            prompt = split.rest.ids[index][split.rest.mask[index]]  # (P_i,)
            tokens = completions.ids[index, : lengths[index] - prompt.numel()]  # (T_i - 1,)
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
