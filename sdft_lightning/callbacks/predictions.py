"""Writes the completions of the predict command to predictions.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from sdft_lightning.callbacks.run_files import append_lines, run_folder, unused_path


class PredictionWriter(BasePredictionWriter):
    """One line a question: id, prompt, completion, truncated. Each rank writes its own file."""

    def __init__(self) -> None:
        super().__init__("batch")
        self._path: Any = None

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the completions of a batch."""
        if self._path is None:
            rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
            self._path = unused_path(run_folder(trainer) / f"predictions{rank}.jsonl")
        append_lines(self._path, prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where they are."""
        if self._path is not None:
            print(f"Completions written to {self._path}")
