"""Accuracies of named tasks over all batches and ranks, with their intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
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
        if name not in self._sums:
            # Not the default dtype, which Lightning's bf16-true makes bfloat16: it counts to 256.
            new = [SumMetric() for _ in range(2)]
            for metric in new:
                metric.set_dtype(torch.float32).to(device)
            self._sums[name] = (new[0], new[1])
        total, number = self._sums[name]
        total.update(torch.tensor(scores, dtype=torch.float32, device=device))
        number.update(torch.tensor(len(scores), dtype=torch.float32, device=device))

    def take(self) -> dict[str, Accuracy]:
        """The accuracy of each task that was graded since the last call."""
        found: dict[str, Accuracy] = {}
        for name, (total, number) in self._sums.items():
            graded = int(number.compute())
            if graded:
                score = float(total.compute())
                found[name] = Accuracy(score / graded, *wilson_interval(score, graded))
            total.reset()
            number.reset()
        return found
