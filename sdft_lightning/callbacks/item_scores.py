"""Writes the score of every answer of a test down, so that two models can be compared by item."""

from __future__ import annotations

import math
from typing import Any

import lightning as L

from sdft_lightning.callbacks.run_files import append_lines, run_folder, unused_path
from sdft_lightning.files.json_text import json_text
from sdft_lightning.types import task_data

BENCHMARKS_FILE = "benchmarks.json"


class ItemScores(L.Callback):
    """One line a graded answer in items.jsonl: task, id, score, completion.

    The score is null where a judge gave no verdict. Each rank writes its own file.
    """

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the answers of a batch."""
        graded = (outputs or {}).get("graded")
        if graded is None or not graded.scores:
            return
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        records = [
            {
                "task": graded.task,
                "id": row.id,
                "score": None if math.isnan(score) else score,
                "completion": text,
            }
            for row, score, text in zip(graded.rows, graded.scores, graded.completions, strict=True)
        ]
        append_lines(run_folder(trainer) / f"items{rank}.jsonl", records)

    def on_test_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Write down which metrics of the benchmarks count, in benchmarks.json."""
        data = task_data(trainer)
        suite = None if data is None else data.benchmark_suite
        if suite is not None and trainer.is_global_zero:
            path = unused_path(run_folder(trainer) / BENCHMARKS_FILE)
            path.write_text(json_text(suite.counted) + "\n", encoding="utf-8")
