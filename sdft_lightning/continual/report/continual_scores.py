"""The continual-learning field's figures of a matrix of accuracies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


class ContinualScores(NamedTuple):
    """What a sequence of stages came to; nan where it is not defined or not measured.

    Attributes:
        average_accuracy: Mean accuracy over all tasks after the last stage.
        forgetting: How far earlier tasks fell below their best.
        backward_transfer: What later stages did to earlier tasks.
        forward_transfer: What earlier stages did to later tasks before those were trained.
    """

    average_accuracy: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float


def continual_scores(accuracy: Matrix) -> ContinualScores:
    """All four figures of one run.

    Args:
        accuracy: (T + 1, T); [i, j] is the accuracy on task j + 1 after stage i, and row 0 is the
            base model. nan where it was not measured.
    """
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] + 1:
        raise ValueError(f"accuracy must be (T + 1, T), base first; got {accuracy.shape}.")
    return ContinualScores(
        average_accuracy(accuracy),
        forgetting(accuracy),
        backward_transfer(accuracy),
        forward_transfer(accuracy),
    )


def average_accuracy(accuracy: Matrix) -> float:
    """ACC = 1/T Σ_j R[T, j].

    Source: D. Lopez-Paz, M. Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017
    (arXiv 1706.08840).

    Args:
        accuracy: As in `continual_scores`.
    """
    return float(accuracy[-1].mean())


def backward_transfer(accuracy: Matrix) -> float:
    """BWT = 1/(T - 1) Σ_{j < T} (R[T, j] - R[j, j]): below zero where earlier tasks suffered.

    Source: Lopez-Paz and Ranzato 2017.

    Args:
        accuracy: As in `continual_scores`.

    Returns:
        nan for a single task.
    """
    after = accuracy[1:]  # (T, T) without the base
    if len(after) < 2:
        return float("nan")
    return float((after[-1] - np.diagonal(after))[:-1].mean())


def forward_transfer(accuracy: Matrix) -> float:
    """FWT = 1/(T - 1) Σ_{j > 1} (R[j - 1, j] - b[j]): above zero where earlier stages helped.

    Source: Lopez-Paz and Ranzato 2017. There b is the accuracy of a model with random
    weights; fine-tuning starts from a trained model, so b is the accuracy of the base model here.

    Args:
        accuracy: As in `continual_scores`.

    Returns:
        nan for a single task.
    """
    count = accuracy.shape[1]
    if count < 2:
        return float("nan")
    later = np.arange(1, count)
    before_own_stage = accuracy[later, later]  # (T - 1,) row i is stage i: the one before task i+1
    return float((before_own_stage - accuracy[0, later]).mean())


def forgetting(accuracy: Matrix) -> float:
    """F = 1/(T - 1) Σ_{j < T} (max_{l in 1 .. T - 1} R[l, j] - R[T, j]); below zero for a gain.

    Source: A. Chaudhry, P. K. Dokania, T. Ajanthan, P. H. S. Torr, Riemannian Walk for Incremental
    Learning: Understanding Forgetting and Intransigence, ECCV 2018 (arXiv 1801.10112). As
    there, the best is that of any stage before the last, also of one before the task's own; the
    base is none of them.

    Args:
        accuracy: As in `continual_scores`.

    Returns:
        nan for a single task.
    """
    after = accuracy[1:]  # (T, T) without the base
    if len(after) < 2:
        return float("nan")
    best = after[:-1].max(axis=0)  # (T,)
    return float((best - after[-1])[:-1].mean())
