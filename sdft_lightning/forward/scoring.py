"""Log-likelihoods of continuations, with each context computed once for all that follow it.

Short continuations of a context are branches of one row: they stand behind it, one after another.
The attention mask lets each see the context and itself only, and its positions start anew behind
the context. So nothing is computed twice, nothing copied, and only whole rows are padded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.hidden import apply_head, completion_hidden_states, output_head
from sdft_lightning.forward.kv_cache import cache_argument, cache_of
from sdft_lightning.forward.layout import (
    SHORTEST,
    SplitPrompts,
    attention_mask,
    can_share,
    encode_prefix,
    split_if_worth,
    split_prompts,
    takes_own_mask,
)
from sdft_lightning.losses.masking import position_ids
from sdft_lightning.models.eval_mode import eval_mode
from sdft_lightning.models.products import without_slow_autocast
from sdft_lightning.types import ContinuationScore, OutputHead, ScoringBatch

# Logits that are formed at a time: 2**24 are 64 MB in float32.
_LOGITS_AT_A_TIME = 1 << 24
# Longer continuations go one a row: the mask of a row grows with the square of its length.
_LONGEST_BRANCH = 128


@torch.no_grad()
def score_continuations(
    model: Any, batch: ScoringBatch, share: bool = True
) -> list[ContinuationScore]:
    """Log-likelihood of each continuation after its context; the model is in eval mode meanwhile.

    Args:
        model: A causal language model of transformers.
        batch: The C contexts and R continuations.
        share: Compute a context once for all its continuations, where the model allows it.

    Returns:
        R scores, float32 sums over the tokens of each continuation.
    """
    keep = batch.continuation_mask  # (R, T)
    with eval_mode(model), without_slow_autocast(model):
        short = keep.shape[1] <= _LONGEST_BRANCH
        if share and short and can_share(model) and takes_own_mask(model):
            hidden = branch_hidden_states(model, batch)  # (N, D)
        elif share and can_share(model) and paths_of(model).drops_rows:
            hidden = _shared_hidden_states(model, batch)  # (N, D)
        else:
            hidden = completion_hidden_states(
                model,
                batch.contexts.rows(batch.owner),
                batch.continuations,
                keep,
                share_prefix=False,
            )  # (N, D)
        log_probs, greedy = _token_scores(output_head(model), hidden, batch.continuation_ids[keep])
    rows = keep.nonzero()[:, 0]  # (N,) row of each token
    sums = torch.zeros(keep.shape[0], dtype=torch.float64, device="cpu")  # (R,)
    sums.index_add_(0, rows.cpu(), log_probs.double().cpu())
    misses = torch.zeros(keep.shape[0], dtype=torch.long)  # (R,)
    misses.index_add_(0, rows.cpu(), (~greedy).long().cpu())
    return [
        ContinuationScore(total, missed == 0)
        for total, missed in zip(sums.tolist(), misses.tolist(), strict=True)
    ]


def _shared_hidden_states(model: Any, batch: ScoringBatch) -> Tensor:
    """Hidden states `(N, D)` that predict the kept tokens.

    What all contexts begin with is computed once, then the rest of each context, then each
    continuation on the keys and values of its own context.
    """
    cache, ids = None, batch.context_ids
    mask = batch.context_mask  # (C, P)
    shared = 0
    if ids.shape[0] > 1:
        split = split_prompts(batch.contexts)
        if split.prefix_ids.numel() >= SHORTEST:
            shared, ids = split.prefix_ids.numel(), split.rest.ids
            cache = encode_prefix(model, split.prefix_ids, ids.shape[0])
            ones = split.rest.mask.new_ones(ids.shape[0], shared)  # (C, K)
            mask = torch.cat([ones, split.rest.mask], dim=1)  # (C, K + R)
    output = model.base_model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=position_ids(mask)[:, shared:],
        **cache_argument(model.base_model, cache),
        use_cache=True,
    )
    first = output.last_hidden_state[batch.owner, -1:]  # (R, 1, D)
    keep = batch.continuation_mask  # (R, T)
    if keep.shape[1] == 1:
        only: Tensor = first[keep]  # (N, D)
        return only
    cache = cache_of(output)
    cache.batch_select_indices(batch.owner)
    mask = torch.cat([mask[batch.owner], keep[:, :-1]], dim=1)  # (R, P + T - 1)
    output = model.base_model(
        input_ids=batch.continuation_ids[:, :-1],
        attention_mask=mask.long(),
        position_ids=position_ids(mask)[:, 1 - keep.shape[1] :],
        **cache_argument(model.base_model, cache),
        use_cache=True,
    )
    return torch.cat([first, output.last_hidden_state], dim=1)[keep]  # (N, D)


def _token_scores(head: OutputHead, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 log-probability `(N,)` of each token, and whether it is the likeliest `(N,)`."""
    vocabulary = head.weight.shape[0]
    at_a_time = min(max(1, _LOGITS_AT_A_TIME // vocabulary), max(1, hidden.shape[0]))
    # Memory that is used again: the system's zeroing of new pages was a tenth of this function.
    buffer = torch.empty(at_a_time, vocabulary, dtype=torch.float32, device=hidden.device)
    log_probs, greedy = [], []
    for states, ids in zip(hidden.split(at_a_time), token_ids.split(at_a_time), strict=True):
        logits = apply_head(head, states).float()  # (n, V)
        # As lm-evaluation-harness does: logsumexp would be nearer to float64 by 1e-5 a token, and
        # further from the harness.
        log_softmax = torch.log_softmax(logits, dim=-1, out=buffer[: logits.shape[0]])
        chosen = log_softmax.gather(-1, ids.unsqueeze(-1))  # (n, 1)
        log_probs.append(chosen.squeeze(-1))
        greedy.append(logits.argmax(dim=-1) == ids)
    return torch.cat(log_probs), torch.cat(greedy)


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
    contexts = split_if_worth(batch.contexts)
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
    filled = contexts.rest.mask.sum(dim=1).tolist()  # columns used so far
    last = [length - 1 for length in filled]
    start = []
    for row, length in zip(owner, inputs, strict=True):
        start.append(filled[row])
        filled[row] += length
    device = contexts.rest.ids.device
    shape = (len(filled), max(filled))
    ids = torch.zeros(shape, dtype=torch.long, device=device)  # (C, L)
    part = torch.full(shape, _PADDING, device=device)  # (C, L)
    positions = torch.zeros(shape, dtype=torch.long, device=device)  # (C, L)
    for row, end in enumerate(last):
        ids[row, : end + 1] = contexts.rest.ids[row][contexts.rest.mask[row]]
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
