"""Learning-rate schedule: the optimizer's rate, warmed up and then lowered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch.optim import Optimizer

from sdft_lightning.errors import UserError, check_choice

ScheduleName = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over the run; the defaults are the paper's.

    Args:
        name: cosine or linear to 0 at the last step, or constant; each after the warm-up.
        warmup_ratio: Part of the run in which the rate rises from 0.
        warmup_steps: The same in optimizer steps; instead of the ratio.
    """

    name: ScheduleName = "cosine"
    warmup_ratio: float | None = None
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse unknown names, both ways of warm-up at once, and values out of range."""
        check_choice("schedule.name", self.name, get_args(ScheduleName))
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise UserError(
                f"schedule: got warmup_ratio {self.warmup_ratio} and warmup_steps "
                f"{self.warmup_steps}; give one of them."
            )
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise UserError(
                f"schedule.warmup_ratio: got {self.warmup_ratio}, allowed is 0 <= ratio < 1."
            )
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(
                f"schedule.warmup_steps: got {self.warmup_steps}, allowed are 0 and more."
            )

    def warmup(self, total_steps: int) -> int:
        """Optimizer steps of warm-up in a run of `total_steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil((self.warmup_ratio or 0.0) * total_steps)

    def build(self, optimizer: Optimizer, total_steps: int) -> Any:
        """The scheduler, stepped once an optimizer step (transformers' `get_scheduler`)."""
        from transformers import get_scheduler

        name = "constant_with_warmup" if self.name == "constant" else self.name
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=self.warmup(total_steps),
            num_training_steps=total_steps,
        )
