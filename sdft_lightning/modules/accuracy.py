"""Accuracies of named tasks over all batches and ranks, with their intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import distributed
from torchmetrics import SumMetric

from sdft_lightning.graders import wilson_interval


class Accuracy(NamedTuple):
    """Mean score of a task, and its 95 % Wilson interval."""

    value: float
    low: float
    high: float


class TaskAccuracies:
    """Sums of scores and counts by name; torchmetrics adds them up over ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[SumMetric, SumMetric]] = {}

    def count(self, name: str, scores: list[float], device: torch.device) -> None:
        """Add the scores of a batch; NaN (a judge gave no verdict) is left out."""
        scores = [score for score in scores if not math.isnan(score)]
        total, number = self._sums_of(name, device)
        total.update(torch.tensor(scores, dtype=torch.float32, device=device))
        number.update(torch.tensor(len(scores), dtype=torch.float32, device=device))

    def take(self, device: torch.device) -> dict[str, Accuracy]:
        """The accuracy of each task that was graded since the last call; by all ranks at once.

        Args:
            device: Where sums are added up, for tasks that this rank has not met.
        """
        found: dict[str, Accuracy] = {}
        for name in _names_of_all_ranks(list(self._sums)):
            total, number = self._sums_of(name, device)
            graded = int(number.compute())  # a collective
            score = float(total.compute())
            if graded:
                found[name] = Accuracy(score / graded, *wilson_interval(score, graded))
            total.reset()
            number.reset()
        return found

    def _sums_of(self, name: str, device: torch.device) -> tuple[SumMetric, SumMetric]:
        if name not in self._sums:
            # Not the default dtype, which Lightning's bf16-true makes bfloat16: it counts to 256.
            new = [SumMetric() for _ in range(2)]
            for metric in new:
                metric.set_dtype(torch.float32).to(device)
            self._sums[name] = (new[0], new[1])
        return self._sums[name]


def _names_of_all_ranks(mine: list[str]) -> list[str]:
    """The names that any rank has, in the same order on all of them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return mine
    of_ranks: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(of_ranks, mine)
    return list(dict.fromkeys(name for names in of_ranks for name in names))
