"""Log-likelihoods of continuations, with each context computed once for all that follow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdft_lightning.forward.branches import branch_hidden_states
from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.hidden import apply_head, completion_hidden_states, output_head
from sdft_lightning.forward.kv_cache import cache_argument, cache_of
from sdft_lightning.forward.prefix import (
    SHORTEST,
    can_share,
    encode_prefix,
    split_prompts,
    takes_own_mask,
)
from sdft_lightning.losses.masking import position_ids
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
            hidden = branch_hidden_states(model, batch)  # (N, D)
        elif share and can_share(model) and paths_of(model).drops_rows:
            hidden = _shared_hidden_states(model, batch)  # (N, D)
        else:
            hidden = completion_hidden_states(
                model,
                batch.context_ids[batch.owner],
                batch.context_mask[batch.owner],
                batch.continuation_ids,
                keep,
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
        split = split_prompts(ids, mask)
        if split.prefix_ids.numel() >= SHORTEST:
            shared, ids = split.prefix_ids.numel(), split.rest_ids
            cache = encode_prefix(model, split.prefix_ids, ids.shape[0])
            ones = split.rest_mask.new_ones(ids.shape[0], shared)  # (C, K)
            mask = torch.cat([ones, split.rest_mask], dim=1)  # (C, K + R)
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
