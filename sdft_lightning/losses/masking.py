"""Which tokens count: completion and loss masks, position ids, and the means over them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from sdft_lightning.errors import UserError


def completion_mask(completion_ids: Tensor, stop_ids: Collection[int]) -> Tensor:
    """Mark each row up to and including its first stop token.

    The stop token itself is kept, also where the padding token has the same id, so that the
    student learns to stop.

    Args:
        completion_ids: `(B, T)` token ids.
        stop_ids: Ids of which any ends a completion.

    Returns:
        `(B, T)` boolean.
    """
    stops = torch.tensor(sorted(stop_ids), device=completion_ids.device)  # (S,)
    is_stop = torch.isin(completion_ids, stops)  # (B, T)
    stops_before = is_stop.cumsum(dim=1) - is_stop.long()  # (B, T)
    return stops_before == 0


def loss_mask(
    completion_ids: Tensor,
    completion_mask: Tensor,
    num_loss_tokens_to_skip: int,
    think_end_id: int | None = None,
    opens_thinking: bool = False,
    think_start_id: int | None = None,
) -> Tensor:
    """Leave the first tokens of each completion's answer out of the loss.

    The answer starts with the completion, or after the first `</think>` where there is one. A
    completion that was opened with `<think>` and never closes it has no answer: all of its
    tokens are kept.

    Args:
        completion_ids: `(B, T)`.
        completion_mask: `(B, T)`.
        num_loss_tokens_to_skip: How many tokens of the answer are left out.
        think_end_id: Id of `</think>`, where the tokenizer has it.
        opens_thinking: Whether the prompt itself ends inside `<think>`.
        think_start_id: Id of `<think>`, for completions that begin with it.

    Returns:
        `(B, T)` boolean, a part of `completion_mask`.

    Raises:
        UserError: If `num_loss_tokens_to_skip` is negative.
    """
    if num_loss_tokens_to_skip < 0:
        raise UserError(
            f"num_loss_tokens_to_skip: got {num_loss_tokens_to_skip}, allowed are 0 and more."
        )
    length = completion_ids.shape[1]
    columns = torch.arange(length, device=completion_ids.device)  # (T,)
    start = torch.zeros_like(completion_ids[:, :1])  # (B, 1)
    if think_end_id is not None and length:
        is_end = (completion_ids == think_end_id) & completion_mask  # (B, T)
        closes = is_end.any(dim=1, keepdim=True)  # (B, 1)
        first = is_end.long().argmax(dim=1, keepdim=True) + 1  # (B, 1)
        opens = torch.full_like(closes, opens_thinking)  # (B, 1)
        if think_start_id is not None:
            # Only where a completion begins with it: elsewhere it is part of an answer.
            opens |= completion_ids[:, :1] == think_start_id
        start = start + length * (opens & ~closes)  # (B, 1)
        start = torch.where(closes, first, start)  # (B, 1)
    skipped = (columns >= start) & (columns < start + num_loss_tokens_to_skip)  # (B, T)
    return completion_mask & ~skipped


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count kept tokens only, so that left padding does not shift a row.

    Args:
        attention_mask: `(B, L)`, true = keep.

    Returns:
        `(B, L)` int64; 0 on the padding before the first kept token.
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where none is.

    Args:
        values: Any shape.
        mask: The same shape, boolean.

    Returns:
        Scalar.
    """
    return (values * mask).sum() / mask.sum().clamp(min=1)


def sequence_weights(mask: Tensor) -> Tensor:
    """Weight of each token in the mean over tokens, then over rows (METHOD §1).

    `Σ w · D` equals `mean_i [ Σ_t m_it D_it / max(1, Σ_t m_it) ]`.

    Args:
        mask: `(B, T)` boolean.

    Returns:
        `(B, T)` float32; zero outside the mask. Rows without a kept token count as loss 0.
    """
    kept = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    return mask.float() / kept / mask.shape[0]  # (B, T)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each row, then over the rows.

    Args:
        values: `(B, T)`.
        mask: `(B, T)` boolean.

    Returns:
        Scalar.
    """
    return (values * sequence_weights(mask)).sum()
