"""How tokens are appended: in steps of our own, or by the model itself in a way that is right.

`prefill` chooses once; all forms are a `Decoding`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.fused import (
    BufferedSteps,
    Decoder,
    DecodingSteps,
    ReadPrompts,
    buffered_parts,
    decoding_kind,
    read_prompts,
)
from sdft_lightning.forward.hidden import apply_head, output_head
from sdft_lightning.forward.kv_cache import (
    CachedSteps,
    Decoding,
    FilledCache,
    Inputs,
    read_end_to_end,
    without_cache,
)
from sdft_lightning.forward.layout import behind_prefix, split_for, takes_lengths
from sdft_lightning.models.precision import product_dtype
from sdft_lightning.types import Tokens


def prefill(
    model: Any,
    prompts: Tokens,
    samples: int,
    steps: int,
    fused: Decoder | None,
    read: list[ReadPrompts] | None = None,
) -> Decoding:
    """Read prompts, each once for all of its completions, and choose how tokens are appended.

    Args:
        model: A causal language model of transformers, in eval mode.
        prompts: `(B, P)`, padded on the left.
        samples: Completions of each prompt (n).
        steps: Most tokens that will be appended.
        fused: The model's parts, where its steps are fused, see `decode_mode`.
        read: The prompts, where fused parts have read them.

    Returns:
        What appends tokens to the B · n rows.
    """
    if fused is None:
        return plain_steps(model, prompts, samples, steps)
    head = model.get_output_embeddings()
    if read is None:
        split = split_for(model, prompts)
        read = [read_prompts(fused, split, product_dtype(head.weight.dtype))]
    return DecodingSteps(fused, head, read, samples, steps)


def plain_steps(model: Any, prompts: Tokens, samples: int, most: int) -> Decoding:
    """Read prompts, each once for all of its completions where the model's cache allows it.

    Args:
        model: A causal language model of transformers, in eval mode.
        prompts: `(B, P)`, padded on the left.
        samples: Completions of each prompt (n).
        most: Most tokens that will be appended.

    Returns:
        What appends tokens to the B · n rows: own steps on buffers where these know the model, else
        its own calls in the way that `forward_paths` found right.
    """
    paths, parts = paths_of(model), buffered_parts(model)
    if samples > 1 and not paths.repeats_rows:
        prompts = prompts.repeat(samples)  # (B · n, P)
    if parts is not None and paths.decoding == "masked" and paths.repeats_rows:
        head, graphs = model.get_output_embeddings(), decoding_kind(model) == "graphs"
        return BufferedSteps(parts, head, _fill(model, prompts), samples, most, graphs)
    steps = _read(model, prompts)
    if samples > 1 and paths.repeats_rows:
        steps.repeat(samples)
    steps.drops_rows = paths.drops_rows
    return steps


def _fill(model: Any, prompts: Tokens) -> FilledCache:
    """Read prompts for steps on buffers, without padding where the attention kernel takes lengths.

    Such a kernel would be told of padding by a mask, from which transformers makes lengths anew in
    each layer.
    """
    if takes_lengths(model):
        return read_end_to_end(model, prompts)
    steps = CachedSteps(model, "masked", behind_prefix(model, split_for(model, prompts)))
    return FilledCache(steps.cache, steps.mask, steps.logits)


def _read(model: Any, prompts: Tokens) -> CachedSteps | GroupedSteps | WholeRows:
    decoding = paths_of(model).decoding
    if decoding == "uncached":
        return WholeRows(model, prompts)
    if decoding == "grouped":
        return GroupedSteps(model, prompts)
    return CachedSteps(model, decoding, behind_prefix(model, split_for(model, prompts)))


class GroupedSteps(Decoding):
    """Prompts of one length side by side without padding, each length on a cache of its own.

    Arguments and attributes as of `CachedSteps`.
    """

    def __init__(self, model: Any, prompts: Tokens) -> None:
        ids, mask = prompts
        lengths = mask.sum(dim=1)  # (B,)
        self.places: list[Tensor] = []  # of each group, the rows of the batch
        self.groups: list[CachedSteps] = []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(-1)  # (G,)
            part = ids[rows][mask[rows]].view(-1, length)  # (G, length)
            self.places.append(rows)
            inputs = Inputs.behind(Tokens(part, torch.ones_like(part).bool()))
            self.groups.append(CachedSteps(model, "grouped", inputs))
        self.logits = self._in_order([group.logits for group in self.groups])  # (B, V)

    def step(self, tokens: Tensor) -> Tensor:
        """Append `(B,)` tokens; logits `(B, V)`."""
        return self._in_order(
            [group.step(tokens[rows]) for group, rows in zip(self.groups, self.places, strict=True)]
        )

    def repeat(self, times: int) -> None:
        """Repeat each row, next to itself."""
        for number, group in enumerate(self.groups):
            group.repeat(times)
            copies = torch.arange(times, device=group.mask.device)  # (n,)
            self.places[number] = (self.places[number].unsqueeze(1) * times + copies).flatten()
        self.logits = self._in_order([group.logits for group in self.groups])

    def keep(self, rows: Tensor) -> None:
        """Keep some rows, named in ascending order."""
        places, groups = [], []
        for group, former in zip(self.groups, self.places, strict=True):
            kept = torch.isin(former, rows).nonzero().squeeze(-1)  # (A_g,)
            if not kept.numel():
                continue
            if kept.numel() < former.numel():
                group.keep(kept)
            groups.append(group)
            places.append(torch.searchsorted(rows, former[kept]))  # (A_g,)
        self.places, self.groups = places, groups

    def _in_order(self, values: list[Tensor]) -> Tensor:
        """Values of the groups as rows of the batch."""
        order = torch.cat(self.places)  # (B,)
        return torch.cat(values)[order.argsort()]  # (B, V)


class WholeRows(Decoding):
    """Rows that are computed from their first token at every step, for models without a cache.

    Arguments and attributes as of `CachedSteps`.
    """

    def __init__(self, model: Any, prompts: Tokens) -> None:
        ids, mask = prompts
        self.model = model
        self.lengths = mask.sum(dim=1)  # (B,)
        self.ids = ids.new_zeros(ids.shape[0], int(self.lengths.max()))  # (B, L)
        for row, tokens in enumerate(ids):
            self.ids[row, : int(self.lengths[row])] = tokens[mask[row]]
        self.logits = self._compute()

    def step(self, tokens: Tensor) -> Tensor:
        """Append `(B,)` tokens; logits `(B, V)`."""
        self.ids = torch.nn.functional.pad(self.ids, (0, 1))  # (B, L + 1)
        self.ids[self._rows(), self.lengths] = tokens
        self.lengths = self.lengths + 1
        return self._compute()

    def repeat(self, times: int) -> None:
        """Repeat each row, next to itself."""
        self.ids = self.ids.repeat_interleave(times, dim=0)  # (B · times, L)
        self.lengths = self.lengths.repeat_interleave(times)  # (B · times,)
        self.logits = self.logits.repeat_interleave(times, dim=0)  # (B · times, V)

    def keep(self, rows: Tensor) -> None:
        """Keep some rows."""
        self.ids, self.lengths = self.ids[rows], self.lengths[rows]

    def _rows(self) -> Tensor:
        return torch.arange(self.ids.shape[0], device=self.ids.device)  # (B,)

    def _compute(self) -> Tensor:
        base = self.model.base_model
        states = base(input_ids=self.ids, **without_cache(base)).last_hidden_state  # (B, L, D)
        return apply_head(output_head(self.model), states[self._rows(), self.lengths - 1])
