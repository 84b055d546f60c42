"""Prints one table of what a validation or test measured."""

from __future__ import annotations

from typing import Any

import lightning as L


class ResultTable(L.Callback):
    """Accuracies with their 95 % intervals, then drift, after the commands validate and test."""

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Print, unless the validation is one of a fit."""
        if trainer.state.fn == "validate":
            self._print(trainer, "val")

    def on_test_end(self, trainer: L.Trainer, module: Any) -> None:
        """Print."""
        self._print(trainer, "test")

    def _print(self, trainer: L.Trainer, stage: str) -> None:
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            print(result_table(metrics, stage))


def result_table(metrics: dict[str, float], stage: str) -> str:
    """The table as text.

    Args:
        metrics: What was logged, by name.
        stage: val or test.

    Returns:
        One line a task and role; a sentence where nothing was graded.
    """
    rows = []
    for name, value in metrics.items():
        prefix, _, metric = name.rpartition("/")
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        if name.startswith(f"{stage}/task/") and low is not None and high is not None:
            task = prefix.removeprefix(f"{stage}/task/")
            who = {"accuracy": "student", "teacher_accuracy": "teacher"}[metric]
            rows.append((task, who, f"{value:.1%}", f"{low:.1%} to {high:.1%}"))
        elif name.startswith(f"{stage}/drift/"):
            rows.append((metric, "KL from base", f"{value:.3f}", "nats a token"))
    if not rows:
        return "Nothing was graded: set data.grader, or data.held_out, to see accuracies."
    rows.insert(0, ("task", "who", "accuracy", "95 % interval"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
