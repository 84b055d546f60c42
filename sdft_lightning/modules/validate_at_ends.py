"""Measures the benchmarks before the first step and after the last."""

from __future__ import annotations

from typing import Any

import lightning as L

from sdft_lightning.types import task_data


class ValidateAtEnds(L.Callback):
    """Runs a validation at both ends of a fit that has benchmarks; other fits are left alone."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """What the model can do before training: the base of the retention."""
        if trainer.global_step == 0:
            self._validate(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """What it can do in the end, unless the last validation has told."""
        if module.capability.measured_at != trainer.global_step:
            self._validate(trainer, module)

    def _validate(self, trainer: Any, module: Any) -> None:
        data = task_data(trainer)
        if data is None or data.benchmark_suite is None:
            return
        module.capability.forced = True
        # As Lightning's own epoch loop runs a validation in the middle of a fit.
        first_loop_iter = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first_loop_iter
