"""Several continuations of a context in one forward pass, as branches blind to each other.

A row holds a context and behind it all its continuations, one after another. The attention mask
lets every continuation see its context and itself only, and its positions start anew behind the
context. So nothing is computed twice, nothing copied, and only whole rows are padded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.kv_cache import cache_argument
from sdft_lightning.forward.packing import attention_mask
from sdft_lightning.forward.prefix import SplitPrompts, encode_prefix, split_if_worth
from sdft_lightning.types import ScoringBatch

_CONTEXT, _PADDING = -2, -1


class _Rows(NamedTuple):
    """Contexts with their continuations behind them, L columns in all.

    Attributes:
        ids: `(C, L)` tokens; of each continuation all but the last, which predicts nothing.
        part: `(C, L)` the continuation that a column belongs to, `_CONTEXT` or `_PADDING`.
        positions: `(C, L)` counted anew behind the context for each continuation.
        last: `(C,)` column of the context's last token.
        start: `(R,)` column at which each continuation begins.
    """

    ids: Tensor
    part: Tensor
    positions: Tensor
    last: Tensor
    start: Tensor


def branch_hidden_states(model: Any, batch: ScoringBatch) -> Tensor:
    """Hidden states that predict the kept tokens of all continuations.

    Args:
        model: A causal language model of transformers that takes a mask of its user's own.
        batch: C contexts and R continuations.

    Returns:
        `(N, D)`, continuation by continuation.
    """
    contexts = split_if_worth(batch.context_ids, batch.context_mask)
    shared = contexts.prefix_ids.numel()
    rows = _lay_out(contexts, batch)
    cache = None
    if shared:
        cache = encode_prefix(model, contexts.prefix_ids, rows.ids.shape[0])
    output = model.base_model(
        input_ids=rows.ids,
        attention_mask=attention_mask(_visible(rows.part), shared, model.dtype),
        position_ids=rows.positions + shared,
        **cache_argument(model.base_model, cache),
        use_cache=cache is not None,
    )
    keep = batch.continuation_mask  # (R, T)
    # The first token is predicted by the context's last state, token t by that of token t - 1.
    steps = torch.arange(keep.shape[1], device=keep.device)  # (T,)
    columns = rows.start.unsqueeze(1) + steps - 1  # (R, T)
    columns[:, 0] = rows.last[batch.owner]
    owners = batch.owner.unsqueeze(1).expand_as(columns)  # (R, T)
    chosen: Tensor = output.last_hidden_state[owners[keep], columns[keep]]
    return chosen  # (N, D)


def _lay_out(contexts: SplitPrompts, batch: ScoringBatch) -> _Rows:
    owner = batch.owner.tolist()
    inputs = (batch.continuation_mask.sum(dim=1) - 1).tolist()  # of each continuation
    filled = contexts.rest_mask.sum(dim=1).tolist()  # columns used so far
    last = [length - 1 for length in filled]
    start = []
    for row, length in zip(owner, inputs, strict=True):
        start.append(filled[row])
        filled[row] += length
    device = contexts.rest_ids.device
    shape = (len(filled), max(filled))
    ids = torch.zeros(shape, dtype=torch.long, device=device)  # (C, L)
    part = torch.full(shape, _PADDING, device=device)  # (C, L)
    positions = torch.zeros(shape, dtype=torch.long, device=device)  # (C, L)
    for row, end in enumerate(last):
        ids[row, : end + 1] = contexts.rest_ids[row][contexts.rest_mask[row]]
        part[row, : end + 1] = _CONTEXT
        positions[row, : end + 1] = torch.arange(end + 1, device=device)
    for index, (row, first, length) in enumerate(zip(owner, start, inputs, strict=True)):
        columns = slice(first, first + length)
        ids[row, columns] = batch.continuation_ids[index, :length]
        part[row, columns] = index
        positions[row, columns] = last[row] + 1 + torch.arange(length, device=device)
    return _Rows(
        ids,
        part,
        positions,
        torch.tensor(last, device=device),
        torch.tensor(start, device=device),
    )


def _visible(part: Tensor) -> Tensor:
    """Which keys each query sees, `(C, L, L)`.

    Everyone sees what of the row's context came before, and a continuation what of itself came
    before. Padding sees the context, so that no query is blind.
    """
    order = torch.arange(part.shape[1], device=part.device)  # (L,)
    causal = order.unsqueeze(0) <= order.unsqueeze(1)  # (L, L) query, key
    same = part.unsqueeze(1) == part.unsqueeze(2)  # (C, L, L)
    return causal & (same | (part == _CONTEXT).unsqueeze(1))
