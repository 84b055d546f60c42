"""How long a run is, told as it starts: a few rows for one epoch are a few optimizer steps only."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from sdft_lightning.types import task_data

log = logging.getLogger(__name__)

# The paper's shortest runs have some hundred optimizer steps.
_FEW_STEPS = 10


class RunLength(L.Callback):
    """Tells rows, micro-batches and optimizer steps of a fit, and warns where the steps are few."""

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Tell it before the first step, where the rows are those of our data module."""
        data = task_data(trainer)
        total = pl_module.total_steps()
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
