"""Writes the student as a `save_pretrained` folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from sdft_lightning.callbacks.run_files import run_folder, unused_path


class ExportModel(L.Callback):
    """Exports the student at the end of a fit, and at every n-th step if asked.

    Args:
        at_end: Export when training ends, to <run>/exported/final.
        every_n_steps: Optimizer steps between further exports, to <run>/exported/step-<n>; none
            without it.
    """

    def __init__(self, at_end: bool = True, every_n_steps: int | None = None) -> None:
        self.at_end = at_end
        self.every_n_steps = every_n_steps
        self._exported_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is due before the next optimizer step, also in a resumed run."""
        self._exported_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export, if the step's turn has come."""
        step = trainer.global_step
        due = self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0
        if due and step != self._exported_at:
            self._exported_at = step
            self._export(trainer, module, f"step-{step}")

    def on_fit_end(self, trainer: L.Trainer, module: Any) -> None:
        """Export the final student."""
        if self.at_end:
            self._export(trainer, module, "final")

    def _export(self, trainer: L.Trainer, module: Any, name: str) -> None:
        if trainer.is_global_zero:
            # A resumed run may come by here again; the older export stays.
            export_model(module, unused_path(run_folder(trainer) / "exported" / name))


def export_model(module: Any, folder: Path) -> None:
    """Save the student and its tokenizer, in safetensors.

    Args:
        module: A `PolicyModule` with its model loaded.
        folder: Must not exist yet.
    """
    folder.mkdir(parents=True)
    module.student.save_pretrained(folder)
    module.tokenizer.save_pretrained(folder)
