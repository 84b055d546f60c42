"""How prompts and completions are laid out as rows of a pass, so that little is computed twice.

- `padded`: a prompt with its completion in each row;
- `packed`: several of these side by side, where that saves padding. The attention mask separates
  them, and positions start anew with each;
- `end_to_end`: all of them in one row without padding or mask, for attention kernels that take
  their lengths (flash attention);
- `alone`: rows that begin in column 0, for models that do not read left padding;
- `after`: completions behind prompts whose keys and values are known.

What all prompts begin with, such as a system turn, is computed once: at batch size 1, repeated;
gradients flow through the repetition. `SHORTEST` and `can_share` say where. The last token of a
completion is left out: nothing is predicted from it. Results are equal up to rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.forward_paths import (
    kernel_takes_lengths,
    paths_of,
    sees_all_before,
)
from sdft_lightning.forward.kv_cache import Inputs, Lengths, cache_of, run
from sdft_lightning.losses.bounded import by_device
from sdft_lightning.losses.masking import position_ids
from sdft_lightning.models.sharding import is_sharded
from sdft_lightning.types import Tokens

# Below this many shared tokens an extra forward pass is not worth its overhead. On a GPU it
# launches all kernels of the model once more, a time for a hundred tokens and more (reckoned, not
# measured).
SHORTEST = {"cpu": 8, "cuda": 128}
# Rows may grow to this many tokens: longer ones pack better, and pay it back in attention.
WIDTH = 256
# Packed only where it saves at least this part of the tokens.
_WORTH = 0.1
_PADDING = -1


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


def takes_lengths(model: Any) -> bool:
    """Whether the model's attention tells sequences that lie end to end apart by their lengths."""
    return kernel_takes_lengths(model) and paths_of(model).ends_to_end


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
        if found.prefix_ids.numel() >= by_device(SHORTEST, prompts.ids.device.type):
            return found
    return SplitPrompts.whole(prompts)


def split_for(model: Any, prompts: Tokens) -> SplitPrompts:
    """Split off the prefix that all prompts share, where it pays and the model can share it.

    Args:
        model: A causal language model of transformers.
        prompts: `(B, P)`, padded on the left.
    """
    return split_if_worth(prompts) if can_share(model) else SplitPrompts.whole(prompts)


def encode_prefix(model: Any, prefix_ids: Tensor, rows: int) -> Any:
    """Keys and values of a prefix for so many rows.

    Args:
        model: A causal language model of transformers.
        prefix_ids: `(K,)`.
        rows: B.

    Returns:
        A cache of transformers with K positions of B rows; None without a prefix.
    """
    if not prefix_ids.numel():
        return None
    cache = cache_of(model.base_model(input_ids=prefix_ids.unsqueeze(0), use_cache=True))
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    return cache


def behind_prefix(model: Any, split: SplitPrompts) -> Inputs:
    """The rest of prompts, behind their common prefix, which is computed here.

    Args:
        model: A causal language model of transformers.
        split: The prompts.
    """
    rows, shared = split.rest.ids.shape[0], split.prefix_ids.numel()
    before = split.rest.mask.new_ones(rows, shared)  # (B, K)
    return Inputs.behind(split.rest, before, encode_prefix(model, split.prefix_ids, rows))


class Layout(NamedTuple):
    """A pass, and which of its states predict R completions of up to T tokens.

    Attributes:
        inputs: Of the pass, G rows of L columns.
        row: `(R,)` row of each completion.
        columns: `(R, T)` column of the state that predicts each token.
        before: `(G, 1, D)` states in front of column 0, which then counts as column 1.
    """

    inputs: Inputs
    row: Tensor
    columns: Tensor
    before: Tensor | None = None

    def states(self, model: Any, keep: Tensor) -> Tensor:
        """The states that predict the kept tokens.

        Args:
            model: A causal language model of transformers.
            keep: `(R, T)`.

        Returns:
            `(N, D)`, row by row.
        """
        parts = [] if self.before is None else [self.before]
        if self.inputs.ids.shape[1]:
            parts.append(run(model, self.inputs).last_hidden_state)
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (G, L, D)
        rows = self.row.unsqueeze(1).expand_as(self.columns)  # (R, T)
        return hidden[rows[keep], self.columns[keep]]  # (N, D)


def layout_of(model: Any, split: SplitPrompts, completions: Tokens, pack: bool) -> Layout:
    """The layout that is right for a model, and the shortest one.

    Args:
        model: A causal language model of transformers.
        split: R prompts.
        completions: `(R, T)`, padded on the right.
        pack: Lay short rows side by side where that saves padding, or end to end.
    """
    if pack and takes_lengths(model):
        return end_to_end(split, completions)
    if not paths_of(model).pads_left:
        return alone(split, completions)
    rows = pack_if_worth(split, completions) if pack and takes_own_mask(model) else None
    return padded(model, split, completions) if rows is None else packed(model, split, rows)


def padded(model: Any, split: SplitPrompts, completions: Tokens) -> Layout:
    """A prompt, padded on the left, with its completion in each row."""
    ids = torch.cat([split.rest.ids, completions.ids[:, :-1]], dim=1)  # (R, P + T - 1)
    mask = torch.cat([split.rest.mask, completions.mask[:, :-1]], dim=1)  # (R, P + T - 1)
    # Padding tokens may be embedded as zeros, where some norms have no gradient: repeat a real one.
    ids = torch.where(mask, ids, split.rest.ids[:, -1:])
    inputs = behind_prefix(model, SplitPrompts(split.prefix_ids, Tokens(ids, mask)))
    row = torch.arange(len(ids), device=ids.device)  # (R,)
    return Layout(inputs, row, _steps(completions) + split.rest.ids.shape[1] - 1)


def packed(model: Any, split: SplitPrompts, rows: PackedRows) -> Layout:
    """Sequences side by side."""
    shared = split.prefix_ids.numel()
    inputs = Inputs(
        rows.ids,
        attention_mask(own_sequence(rows.sequence), shared, model.dtype),
        rows.positions + shared,
        encode_prefix(model, split.prefix_ids, rows.ids.shape[0]),
    )
    return Layout(inputs, rows.row, rows.columns)


def end_to_end(split: SplitPrompts, completions: Tokens) -> Layout:
    """All sequences in one row, without padding and mask.

    Args:
        split: R prompts, without a prefix.
        completions: `(R, T)`, padded on the right.
    """
    prompts = split.rest
    ids = torch.cat([prompts.ids, completions.ids[:, :-1]], dim=1)  # (R, P + T - 1)
    # A token is an input where another one follows.
    mask = torch.cat([prompts.mask, completions.mask[:, 1:]], dim=1)  # (R, P + T - 1)
    lengths = mask.sum(dim=1)  # (R,)
    starts = lengths.cumsum(0) - lengths  # (R,)
    inputs = Inputs(
        ids[mask].unsqueeze(0),  # (1, L)
        positions=position_ids(mask)[mask].unsqueeze(0),
        lengths=Lengths.of(lengths),
    )
    first = (starts + prompts.mask.sum(dim=1) - 1).unsqueeze(1)  # (R, 1)
    # No state is asked for behind the end of a completion, where columns are not its own.
    return Layout(inputs, torch.zeros_like(lengths), first + _steps(completions))


def alone(split: SplitPrompts, completions: Tokens) -> Layout:
    """Each sequence from column 0, padded behind its end, without mask and positions."""
    lengths = _lengths(split, completions)
    rows = _lay_out(split, completions, lengths, [[index] for index in range(len(lengths))])
    return Layout(Inputs(rows.ids), rows.row, rows.columns)


def after(last: Tensor, mask: Tensor, cache: Any, completions: Tokens) -> Layout:
    """Completions behind prompts whose keys and values are known.

    Args:
        last: `(R, 1, D)` states that predict the first tokens.
        mask: `(R, K)` which of the cached columns are no padding.
        cache: Keys and values of the prompts.
        completions: `(R, T)`, padded on the right.
    """
    tokens = Tokens(completions.ids[:, :-1], completions.mask[:, :-1])
    row = torch.arange(len(tokens.ids), device=tokens.ids.device)  # (R,)
    return Layout(Inputs.behind(tokens, mask, cache), row, _steps(completions), last)


def _steps(completions: Tokens) -> Tensor:
    """`(R, T)` the place of each token in its completion."""
    steps = torch.arange(completions.ids.shape[1], device=completions.ids.device)  # (T,)
    return steps.expand(completions.ids.shape)


class PackedRows(NamedTuple):
    """B sequences in G rows of L columns.

    Attributes:
        ids: `(G, L)` tokens.
        sequence: `(G, L)` which of the B sequences a column belongs to, `_PADDING` for none.
        positions: `(G, L)` counted anew in each sequence.
        row: `(B,)` row of each sequence.
        columns: `(B, T)` column that predicts each token of a completion.
    """

    ids: Tensor
    sequence: Tensor
    positions: Tensor
    row: Tensor
    columns: Tensor


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
    return PackedRows(ids, sequence, positions, row, first.unsqueeze(1) + _steps(completions))


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


def _fill_bins(lengths: list[int], width: int) -> list[list[int]]:
    """First fit, longest first: indices of the sequences of each row."""
    bins: list[list[int]] = []
    free: list[int] = []  # columns of each row
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((i for i, left in enumerate(free) if left >= lengths[index]), None)
        if place is None:
            bins.append([])
            free.append(width)
            place = len(bins) - 1
        bins[place].append(index)
        free[place] -= lengths[index]
    return bins
