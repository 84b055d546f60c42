"""What a stage's fit leaves behind: points to resume from, and the model that it hands on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from sdft_lightning.callbacks import CollapseGuard, TokenBudget
from sdft_lightning.callbacks.export import export_model, origin_of
from sdft_lightning.errors import UserError
from sdft_lightning.files.checkpoint_io import load_checkpoint
from sdft_lightning.files.run_folder import run_folder, unused_path
from sdft_lightning.files.whole_files import write_whole
from sdft_lightning.models.sharding import is_sharded, whole_state_dict

FIT_RESULT = "fit.json"


class ResumePoint(Checkpoint):
    """Writes checkpoints/last.ckpt every few steps, once all of the step is done.

    Lightning's own checkpoint of a step is written before the step's validation, and a run
    resumed from it leaves that validation out. This one waits for it. None is written at the last
    step, whose model is exported next.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._saved_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is due before the next optimizer step, also in a resumed run."""
        self._saved_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save now, unless a validation comes first."""
        loop = trainer.fit_loop
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        ended = trainer.should_stop or 0 < trainer.max_steps <= step
        if ended or step == self._saved_at or step % self.every_n_steps:
            return
        self._saved_at = step
        trainer.save_checkpoint(run_folder(trainer) / "checkpoints" / "last.ckpt")


class StageEnd(L.Callback):
    """Exports the selected model when training ends, then writes fit.json: the fit is finished.

    The model is the last one, or the best one where a ModelCheckpoint watches a metric. Seconds
    are those of the steps that led to it: what was lost to an interruption is not counted.
    """

    def __init__(self) -> None:
        self._seconds_before = 0.0
        self._start = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._start

    def state_dict(self) -> dict[str, float]:
        """The seconds so far."""
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._seconds_before = state_dict["seconds"]

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """Export, and tell what there is."""
        step = selected = trainer.global_step
        folder = run_folder(trainer)
        _check_not_stopped(trainer, step, folder)
        best = _watching(trainer)
        if best is not None:
            selected = load_best(best, module)
        # Spread weights are gathered by all processes together.
        weights = whole_state_dict(module.student) if is_sharded(module.student) else None
        if not trainer.is_global_zero:
            return
        # One that was interrupted while it was written may lie there.
        exported = unused_path(folder / "exported" / f"step-{selected}")
        export_model(module, exported, weights=weights, origin=origin_of(trainer, selected))
        (tokens,) = (each.trained for each in trainer.callbacks if isinstance(each, TokenBudget))
        found = {
            "updates": step,
            "tokens": tokens,
            "selected_step": selected,
            "seconds": round(self._seconds, 1),
            "exported": str(exported.relative_to(folder)),
        }
        write_whole(folder / FIT_RESULT, json.dumps(found) + "\n")


def _check_not_stopped(trainer: Any, step: int, folder: Path) -> None:
    """Refuse to hand on, as if it were trained, what a guard found to collapse."""
    for callback in trainer.callbacks:
        if isinstance(callback, CollapseGuard) and callback.stopped:
            raise UserError(
                f"CollapseGuard stopped this stage after {step} updates: {callback.stopped}. It "
                f"hands nothing on; what it was shows {folder}. Change the method's settings (in a "
                "plan of another name), or set the guard's action to warn."
            )


def _watching(trainer: Any) -> ModelCheckpoint | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor:
            return callback
    return None


def load_best(callback: ModelCheckpoint, module: Any) -> int:
    """Put the best weights into a module.

    Args:
        callback: Kept them.
        module: The module that they are of.

    Returns:
        Their optimizer step.

    Raises:
        UserError: If there are none, or the file is damaged.
    """
    path = callback.best_model_path
    if not path or not Path(path).is_file():
        raise UserError(
            f"select: best has found no model to hand on: {callback.monitor} was never measured, "
            f"or {path or 'its checkpoint'} is gone. Set trainer.val_check_interval so that "
            "validations fall into the stage, or select: last."
        )
    checkpoint = load_checkpoint(path)
    module.load_state_dict(checkpoint["state_dict"])
    step: int = checkpoint["global_step"]
    return step
