"""Losses of given tokens, as pure functions of log-probabilities; the divergences' sisters.

Each takes what a `Divergence` takes, so that the bounded-memory loss works with any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sdft_lightning.losses.divergence import Divergence


def cross_entropy(teacher: Tensor, student: Tensor, token_ids: Tensor) -> Tensor:
    """−log Q(y): the loss of SFT.

    Args:
        teacher: `(..., V)`; not used.
        student: `(..., V)` log-probabilities.
        token_ids: `(...)` the targets y.

    Returns:
        `(...)` in nats.
    """
    return -student.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)  # (...)


def probability_weighted(teacher: Tensor, student: Tensor, token_ids: Tensor) -> Tensor:
    """−sg[Q(y)] · log Q(y): the loss of DFT (Wu et al. 2025, arXiv 2508.05629).

    sg stops the gradient, so that with respect to the logits z it is Q(y) · (Q − onehot(y)).

    Args:
        teacher: `(..., V)`; not used.
        student: `(..., V)` log-probabilities.
        token_ids: `(...)` the targets y.

    Returns:
        `(...)`; 0 for targets that are certain, and also for those that are impossible.
    """
    loss = cross_entropy(teacher, student, token_ids)  # (...)
    return (-loss).exp().detach() * loss


@dataclass(frozen=True)
class PenalisedCrossEntropy:
    """−log Q(y) + λ · D(P, Q): cross-entropy with a penalty for leaving the base model P.

    Args:
        kl_weight: λ.
        divergence: D; forward_kl is KL(P ‖ Q), reverse_kl is KL(Q ‖ P).
    """

    kl_weight: float
    divergence: Divergence

    def __call__(self, teacher: Tensor, student: Tensor, token_ids: Tensor) -> Tensor:
        """Per-token loss.

        Args:
            teacher: `(..., V)` log-probabilities of the base model.
            student: `(..., V)` log-probabilities.
            token_ids: `(...)` the targets y.

        Returns:
            `(...)` in nats.
        """
        penalty = self.divergence(teacher, student, token_ids)  # (...)
        return cross_entropy(teacher, student, token_ids) + self.kl_weight * penalty
