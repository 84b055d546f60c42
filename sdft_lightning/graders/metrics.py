"""What is counted over batches and ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed
from torchmetrics import Metric

from sdft_lightning.graders import wilson_interval

AnyMetric = TypeVar("AnyMetric", bound=Metric)


class Accuracy(NamedTuple):
    """Mean score of a task, and its 95 % Wilson interval."""

    value: float
    low: float
    high: float


class TaskAccuracy(Metric):
    """Mean score of a task with its 95 % Wilson interval.

    Attributes:
        total: Sum of the scores.
        number: How many there are.
    """

    full_state_update = False
    total: Tensor
    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "number"):
            # Not the default dtype, which Lightning's bf16-true makes bfloat16: it counts to 256.
            self.add_state(name, torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, scores: list[float]) -> None:
        """Add the scores of a batch; NaN (a judge gave no verdict) is left out."""
        known = [score for score in scores if not math.isnan(score)]
        scored = torch.tensor(known, dtype=torch.float32, device=self.device)
        self.total = self.total + scored.sum()
        self.number = self.number + len(known)

    def compute(self) -> Accuracy | None:
        """The accuracy over all ranks; None where nothing was graded."""
        graded, score = int(self.number), float(self.total)
        if not graded:
            return None
        return Accuracy(score / graded, *wilson_interval(score, graded))


class WeightedMean(Metric):
    """A mean in float32 of values with weights; one NaN makes it NaN.

    Attributes:
        total: Sum of the values times their weights.
        weight: Sum of the weights.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: float) -> None:
        """Add a scalar."""
        self.total = self.total + value.detach().float() * weight
        self.weight = self.weight + weight

    def compute(self) -> Tensor:
        """The mean over all ranks; NaN where nothing was added."""
        return self.total / self.weight


class NamedMetrics(Generic[AnyMetric]):
    """Metrics of one kind by names that batches bring along, some of them on a few ranks only.

    They are no children of the module: a name is any text, and which there are differs by rank.

    Args:
        make: Makes the metric of a new name.
    """

    def __init__(self, make: Callable[[], AnyMetric]) -> None:
        self.make = make
        self.metrics: dict[str, AnyMetric] = {}

    def of(self, name: str, device: torch.device) -> AnyMetric:
        """The metric of a name, on the device where it is updated and added up over ranks."""
        if name not in self.metrics:
            self.metrics[name] = self.make()
        return self.metrics[name].to(device)

    def compute(self, device: torch.device) -> dict[str, Any]:
        """What each metric comes to over all ranks; then all start anew. By all ranks at once.

        Args:
            device: Where metrics are made whose names this rank has not met.
        """
        found: dict[str, Any] = {}
        for name in _names_of_all_ranks(list(self.metrics)):
            metric = self.of(name, device)
            with warnings.catch_warnings():  # of a name that this rank has not met, or met in vain
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
                found[name] = metric.compute()
        self.metrics.clear()
        return found


def _names_of_all_ranks(mine: list[str]) -> list[str]:
    """The names that any rank has, in the same order on all of them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return mine
    of_ranks: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(of_ranks, mine)
    return list(dict.fromkeys(name for names in of_ranks for name in names))
