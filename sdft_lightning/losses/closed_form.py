"""Gradients of the commonest token losses written down, so that no graph of the logits is kept.

The general way through autograd keeps about twenty tensors of the size of a chunk of logits and
walks over each; here there are five, in memory that the caller uses again. With z the logits
divided by the temperature:

- forward KL(P ‖ Q): its gradient in z is Q − P;
- cross-entropy −log Q(y): Q − onehot(y).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdft_lightning.losses.divergence import Divergence, cross_entropy

# (teacher log-probs (C, V), student log-probs (C, V), token ids (C,), weights (C,) or None, memory
# to work in (BUFFERS, C, V)) -> statistics (7, C), gradient of the weighted sum in z (C, V) or None
ClosedForm = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None]]
BUFFERS = 3


def closed_form(token_loss: Any) -> ClosedForm | None:
    """How to have a loss, its statistics and its gradient without autograd.

    Args:
        token_loss: What `bounded` is asked to sum.

    Returns:
        A function of log-probabilities and weights, or None where there is none for this loss.
    """
    if token_loss is cross_entropy:
        return _cross_entropy
    if (
        isinstance(token_loss, Divergence)
        and token_loss.name == "forward_kl"
        and token_loss.estimator == "full_vocabulary"
    ):
        return _forward_kl
    return None


@torch.no_grad()
def _forward_kl(
    teacher: Tensor, student: Tensor, token_ids: Tensor, weights: Tensor | None, buffers: Tensor
) -> tuple[Tensor, Tensor | None]:
    teacher_probs, student_probs, buffer = buffers  # (C, V)
    torch.exp(teacher, out=teacher_probs)
    torch.exp(student, out=student_probs)
    torch.sub(teacher, student, out=buffer)
    losses = buffer.mul_(teacher_probs).sum(dim=-1)  # (C,)
    statistics = _statistics(
        losses,
        losses.clamp(min=0.0),  # rounding may leave -1e-6
        -torch.mul(student_probs, student, out=buffer).sum(dim=-1),
        -torch.mul(teacher_probs, teacher, out=buffer).sum(dim=-1),
        (teacher.argmax(dim=-1) == student.argmax(dim=-1)).float(),
        _chosen(student, token_ids),
        _chosen(teacher, token_ids),
    )
    if weights is None:
        return statistics, None
    return statistics, student_probs.sub_(teacher_probs).mul_(weights.unsqueeze(-1))


@torch.no_grad()
def _cross_entropy(
    teacher: Tensor, student: Tensor, token_ids: Tensor, weights: Tensor | None, buffers: Tensor
) -> tuple[Tensor, Tensor | None]:
    """With the student in the teacher's place, as there is none."""
    probs, buffer, _ = buffers  # (C, V)
    torch.exp(student, out=probs)
    chosen = _chosen(student, token_ids)  # (C,)
    entropy = -torch.mul(probs, student, out=buffer).sum(dim=-1)  # (C,)
    zeros = torch.zeros_like(chosen)  # (C,)
    statistics = _statistics(-chosen, zeros, entropy, entropy, zeros + 1.0, chosen, chosen)
    if weights is None:
        return statistics, None
    weights = weights.to(probs.dtype).unsqueeze(-1)  # (C, 1)
    return statistics, probs.mul_(weights).scatter_add_(-1, token_ids.unsqueeze(-1), -weights)


def _chosen(log_probs: Tensor, token_ids: Tensor) -> Tensor:
    return log_probs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)  # (C,)


def _statistics(*rows: Tensor) -> Tensor:
    """In the order of `TokenStatistics`."""
    return torch.stack(rows)  # (7, C)
