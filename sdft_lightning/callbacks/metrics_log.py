"""Writes numbers, scores of single answers and predictions to JSON Lines, for other programs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter, Checkpoint

from sdft_lightning.files.run_folder import (
    MeasuredItems,
    append_items,
    append_lines,
    run_folder,
    unused_path,
)
from sdft_lightning.files.texts import json_text
from sdft_lightning.types import task_data


class MetricsLog(L.Callback):
    """Appends a line for each logged training step, validation and test to metrics.jsonl.

    The scores of the single items of a validation or test go to item_scores.jsonl.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._logged_at = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Nothing is due before the next optimizer step, also in a resumed run."""
        self._logged_at = trainer.global_step
        # Lightning puts a module's callbacks behind the user's; those that log what an optimizer
        # step did (the teacher's distance, the effective update) would be read a step late.
        trainer.callbacks = _before_checkpoints(self, trainer.callbacks)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the training metrics of a logged step."""
        step = trainer.global_step
        every = trainer.log_every_n_steps  # 0 is never
        if every and step != self._logged_at and step % every == 0:
            self._logged_at = step
            prefixes = ("train/", "perf/", "guard/")
            metrics = trainer.callback_metrics.items()
            self._write(trainer, "train", {n: x for n, x in metrics if n.startswith(prefixes)})

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Write the validation metrics."""
        if not trainer.sanity_checking:
            self._write(trainer, "validation", measured_metrics(trainer, module, "val"))
            self._write_items(trainer, module, "validation")

    def on_test_end(self, trainer: L.Trainer, module: Any) -> None:
        """Write the test metrics."""
        self._write(trainer, "test", measured_metrics(trainer, module, "test"))
        self._write_items(trainer, module, "test")

    def _write_items(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        command = str(getattr(trainer.state.fn, "value", trainer.state.fn))
        step = trainer.global_step
        measured = [MeasuredItems(command, step, *each) for each in module.evaluator.items.items()]
        if trainer.is_global_zero:
            append_items(run_folder(trainer), stage, measured)

    def _write(self, trainer: L.Trainer, stage: str, metrics: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        values = {name: float(value) for name, value in metrics.items()}
        seconds = round(time.monotonic() - self._start, 1)
        record = {"stage": stage, "step": trainer.global_step, "seconds": seconds, **values}
        append_lines(run_folder(trainer) / "metrics.jsonl", [record])


def _before_checkpoints(callback: L.Callback, callbacks: list[L.Callback]) -> list[L.Callback]:
    """The callbacks in their order, but this one the last before those that write checkpoints."""
    others = [other for other in callbacks if other is not callback]
    checkpoints = [other for other in others if isinstance(other, Checkpoint)]
    return [*(o for o in others if o not in checkpoints), callback, *checkpoints]


def measured_metrics(trainer: L.Trainer, module: Any, stage: str) -> dict[str, float]:
    """What this validation or test has measured, by name.

    Lightning keeps the benchmarks of an earlier validation where this one had none.

    Args:
        trainer: Who knows all metrics.
        module: The module, with its `evaluator`.
        stage: val or test.
    """
    kinds = ["task", "drift", "judge"]
    kinds += ["capability"] if module.evaluator.capability.due else []
    measured = tuple(f"{stage}/{kind}/" for kind in kinds)
    measured += tuple(f"{stage}/paired/{name}/" for name in module.evaluator.paired.tests)
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(measured)
    }


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
