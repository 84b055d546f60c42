"""Learning-rate schedule: the optimizer's rate, warmed up and then lowered."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch.optim import Optimizer

from sdft_lightning.errors import UserError, check_choice

log = logging.getLogger(__name__)

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

    @property
    def needs_an_end(self) -> bool:
        """Whether the rate at a step depends on how many steps there will be."""
        return self.name != "constant" or bool(self.warmup_ratio)

    def check_end(self, has_end: bool) -> None:
        """Refuse a rate that is planned over a run whose length nobody knows.

        Args:
            has_end: Whether a number of steps or epochs ends the run.

        Raises:
            UserError: If there is none and the rate depends on it.
        """
        if self.needs_an_end and not has_end:
            raise UserError(
                f"model.schedule: got {self.name} with warmup_ratio {self.warmup_ratio}, and the "
                "run has no last step (trainer.max_steps -1, trainer.max_epochs -1). Set "
                "trainer.max_steps, or --model.schedule.name=constant with warmup_steps if you "
                "like; trainer.max_time and a stop by a callback leave the length open."
            )

    def build(self, optimizer: Optimizer, total_steps: int | None) -> Any:
        """The scheduler, stepped once an optimizer step (transformers' `get_scheduler`).

        Args:
            optimizer: Whose rates it moves.
            total_steps: Optimizer steps of the run; None where it has no end.

        Raises:
            UserError: If there is no end and the rate depends on it.
        """
        from transformers import get_scheduler

        self.check_end(total_steps is not None)
        warmup = self.warmup(total_steps or 0)
        if total_steps is not None and warmup >= total_steps and self.warmup_steps:
            log.warning(
                f"model.schedule.warmup_steps: got {warmup}, and the run has {total_steps} steps: "
                "the learning rate never comes to the optimizer's lr. Lower it."
            )
        return get_scheduler(
            "constant_with_warmup" if self.name == "constant" else self.name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
        )
