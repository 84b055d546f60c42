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
from sdft_lightning.forward.kv_cache import Inputs, cache_of, run
from sdft_lightning.forward.layout import (
    Layout,
    SplitPrompts,
    after,
    attention_mask,
    behind_prefix,
    can_share,
    encode_prefix,
    split_if_worth,
    takes_own_mask,
)
from sdft_lightning.models.precision import eval_mode, without_slow_autocast
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
            hidden = _branches(model, batch).states(model, keep)  # (N, D)
        elif share and can_share(model) and paths_of(model).drops_rows:
            hidden = _after_contexts(model, batch).states(model, keep)  # (N, D)
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


def _after_contexts(model: Any, batch: ScoringBatch) -> Layout:
    """Continuations behind their contexts, which are computed once, like what these begin with."""
    inputs = behind_prefix(model, split_if_worth(batch.contexts))
    output = run(model, inputs, fill=True)
    assert inputs.mask is not None
    cache = cache_of(output)
    cache.batch_select_indices(batch.owner)
    last = output.last_hidden_state[batch.owner, -1:]  # (R, 1, D)
    return after(last, inputs.mask[batch.owner], cache, batch.continuations)


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


def _branches(model: Any, batch: ScoringBatch) -> Layout:
    """Contexts with all of their continuations, which do not see each other.

    Args:
        model: A causal language model of transformers that takes a mask of its user's own.
        batch: C contexts and R continuations.
    """
    contexts = split_if_worth(batch.contexts)
    shared = contexts.prefix_ids.numel()
    rows = _lay_out(contexts, batch)
    inputs = Inputs(
        rows.ids,
        attention_mask(_visible(rows.part), shared, model.dtype),
        rows.positions + shared,
        encode_prefix(model, contexts.prefix_ids, rows.ids.shape[0]),
    )
    # The first token is predicted by the context's last state, token t by that of token t - 1.
    steps = torch.arange(batch.continuation_ids.shape[1], device=rows.ids.device)  # (T,)
    columns = rows.start.unsqueeze(1) + steps - 1  # (R, T)
    columns[:, 0] = rows.last[batch.owner]
    return Layout(inputs, batch.owner, columns)


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
