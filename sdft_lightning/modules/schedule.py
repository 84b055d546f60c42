"""How long a run is, and how its learning rate moves: warmed up and then lowered."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.files.whole_windows import limited_batches
from sdft_lightning.types import task_data

log = logging.getLogger(__name__)

# Those of transformers that need no measure of a validation; constant is its constant_with_warmup.
ScheduleName = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]
_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")

# The paper's shortest runs have some hundred optimizer steps.
_FEW_STEPS = 10


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over the run; the defaults are the paper's.

    Args:
        name: One of transformers' schedules, e.g. cosine or linear to 0 at the last step, or
            constant; each after the warm-up.
        warmup_ratio: Part of the run in which the rate rises from 0.
        warmup_steps: The same in optimizer steps; instead of the ratio.
        options: What the schedule takes besides, e.g. {min_lr_rate: 0.1} of cosine_with_min_lr,
            {num_decay_steps: 20} of warmup_stable_decay.
    """

    name: ScheduleName = "cosine"
    warmup_ratio: float | None = None
    warmup_steps: int | None = None
    options: dict[str, Any] | None = None

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
        if self.options and self.name in ("constant", "constant_with_warmup"):
            raise UserError(
                f"schedule.options: got {self.options}, and {self.name} takes none. Leave them out."
            )

    def warmup(self, total_steps: int) -> int:
        """Optimizer steps of warm-up in a run of `total_steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil((self.warmup_ratio or 0.0) * total_steps)

    @property
    def needs_an_end(self) -> bool:
        """Whether the rate at a step depends on how many steps there will be."""
        return self.name not in _WITHOUT_END or bool(self.warmup_ratio)

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

    def check_options(self, optimizer: Optimizer) -> None:
        """Refuse options that the schedule does not have, or lacks, before a model is loaded.

        Args:
            optimizer: One of no meaning, which is not used afterwards.

        Raises:
            UserError: If transformers refuses them.
        """
        self.build(optimizer, 10_000 + (self.warmup_steps or 0))

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
        try:
            return get_scheduler(
                "constant_with_warmup" if self.name == "constant" else self.name,
                optimizer,
                num_warmup_steps=warmup,
                num_training_steps=total_steps,
                scheduler_specific_kwargs=self.options,
            )
        except (TypeError, ValueError) as error:  # of options that it does not have, or lacks
            raise UserError(
                f"model.schedule.options: got {self.options}, and {self.name} refuses: {error}. "
                "transformers' documentation of its schedules says what each takes."
            ) from error


def total_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps of a whole run; None where neither steps nor epochs end it.

    Args:
        trainer: Of a fit.
    """
    data = task_data(trainer)
    batches = None if data is None else data.batches_per_epoch
    if batches is None:
        estimate = trainer.estimated_stepping_batches
        return int(estimate) if math.isfinite(estimate) else None
    # Not estimated_stepping_batches: it starts the loaders, which then forget their place
    # when a run is resumed (Lightning #20550).
    batches = limited_batches(trainer, batches)
    per_epoch = max(1, -(-batches // trainer.accumulate_grad_batches))
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
    limits = [max(1, trainer.max_steps)] if trainer.max_steps != -1 else []
    limits += [per_epoch * epochs] if epochs is not None else []
    return min(limits) if limits else None


class RunLength(L.Callback):
    """Tells rows, micro-batches and optimizer steps of a fit, and warns where the steps are few."""

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Tell it before the first step, where the rows are those of our data module."""
        data = task_data(trainer)
        total = total_steps(trainer)
        batches = None if data is None else data.batches_per_epoch
        if total is None or data is None or batches is None:
            return
        rows = len(data.training_rows())
        window = trainer.accumulate_grad_batches
        prompts = data.batch_size * window * trainer.world_size
        log.info(
            f"fit: {_counted(rows, 'row')}, {_counted(batches, 'batch', 'es')} of "
            f"{data.batch_size} an epoch on each device; {prompts} prompts are one optimizer step: "
            f"{_counted(total, 'optimizer step')} in all"
        )
        if total < _FEW_STEPS and trainer.max_steps == -1:
            log.warning(
                f"data.train: the whole run is {_counted(total, 'optimizer step')}, which teaches "
                "hardly anything. Give more rows or more epochs (--trainer.max_epochs), or take "
                "fewer prompts for a step (--data.batch_size, --trainer.accumulate_grad_batches)."
            )


def _counted(count: int, name: str, plural: str = "s") -> str:
    return f"{count} {name}{'' if count == 1 else plural}"
