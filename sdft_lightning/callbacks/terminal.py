"""What a run shows in the terminal: its progress, and a table of what was measured."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from sdft_lightning.callbacks.metrics_log import measured_metrics
from sdft_lightning.errors import check_at_least, printable
from sdft_lightning.files.run_folder import run_folder
from sdft_lightning.graders import Paired


class RunProgressBar(TQDMProgressBar):
    """A bar on a terminal; a line every few steps where the output is a file.

    Args:
        every_n_steps: Optimizer steps between two lines in a file.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        super().__init__()
        check_at_least("RunProgressBar.every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self._terminal = sys.stderr.isatty()
        self._start: tuple[int, float] | None = None
        self._printed_at = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep the bars for terminals."""
        super().setup(trainer, pl_module, stage)
        if not self._terminal:
            self.disable()

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Start the clock."""
        super().on_train_start(trainer, *args)
        self._start = (trainer.global_step, time.monotonic())

    def get_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        """The logged metrics without the version number, and the seconds left."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        short = {
            name.removeprefix("train/").removeprefix("perf/"): value
            for name, value in metrics.items()
        }
        left = self._seconds_left(trainer, pl_module)
        return short if left is None else {**short, "left": format_seconds(left)}

    def _seconds_left(self, trainer: L.Trainer, module: Any) -> float | None:
        if self._start is None or trainer.global_step <= self._start[0]:
            return None
        done = trainer.global_step - self._start[0]
        a_step = (time.monotonic() - self._start[1]) / done
        total = module.total_steps()
        return None if total is None else a_step * max(0, total - trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Move the bar, or print a line."""
        super().on_train_batch_end(trainer, pl_module, *args)
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == 1
        if self._terminal or not due or step == self._printed_at or not trainer.is_global_zero:
            return
        self._printed_at = step
        metrics = {
            name: f"{value:.3g}" if isinstance(value, float) else str(value)
            for name, value in self.get_metrics(trainer, pl_module).items()
        }
        shown = "  ".join(f"{printable(name)} {value}" for name, value in metrics.items())
        total = pl_module.total_steps()
        place = f"{step}" if total is None else f"{step}/{total}"
        print(f"step {place}  {shown}", flush=True)


def format_seconds(seconds: float) -> str:
    """Seconds as `1h02m`, `3m05s` or `42s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


# A standard error times this is half of a 95 % interval.
_NORMAL_95 = 1.96
_NO_FRACTIONS = ("word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte")
_SHAPES = {
    "answer_words": "words an answer",
    "answer_distinct_2": "different pairs of words",
}
_ROLES = {"accuracy": "student", "teacher_accuracy": "teacher"}


class ResultTable(L.Callback):
    """Accuracies and benchmarks with 95 % intervals, and drift, after validate and test.

    Beside them stands what the previous validation (or test) of the same run had, and below, item
    by item, what was right before training and is wrong now, where that is known.
    """

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Print, unless the validation is one of a fit."""
        if trainer.state.fn == "validate":
            self._print(trainer, module, "val")

    def on_test_end(self, trainer: L.Trainer, module: Any) -> None:
        """Print."""
        self._print(trainer, module, "test")

    def _print(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        if trainer.is_global_zero:
            metrics = measured_metrics(trainer, module, stage)
            print(result_table(metrics, stage, previous_metrics(run_folder(trainer), stage)))
            paired = module.evaluator.paired
            if paired.tests:
                print("\n" + paired_table(paired.tests, paired.base_name))


class _Row(NamedTuple):
    """One line of the table."""

    name: str
    what: str
    value: str
    interval: str
    metric: str


def result_table(
    metrics: dict[str, float], stage: str, previous: dict[str, float] | None = None
) -> str:
    """The table as text.

    Args:
        metrics: What was logged, by name.
        stage: val or test.
        previous: The same of an earlier validation, by name.

    Returns:
        One line a task and role, benchmark and metric; a sentence where nothing was measured.
    """
    rows = [row for name in metrics if (row := _row(name, metrics, stage)) is not None]
    if not rows:
        return (
            "Nothing was measured: set data.grader, data.held_out or data.benchmarks.tasks to see "
            "accuracies."
        )
    cells = [("task", "what", "value", "95 % interval", "previous")]
    for row in rows:
        before = (previous or {}).get(row.metric)
        shown = "" if before is None else _shown(row.metric, before)
        cells.append((printable(row.name), printable(row.what), row.value, row.interval, shown))
    if not previous:
        cells = [cell[:4] for cell in cells]  # type: ignore[misc]
    return _aligned(cells)


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def paired_table(tests: Mapping[str, Paired], base: str) -> str:
    """What has changed item by item, as text.

    Args:
        tests: By `<set>/<metric>`.
        base: What was compared with.

    Returns:
        One line a set and metric, and what the words mean.
    """
    cells = [("task", "what", "item by item")]
    for name, test in tests.items():
        task, _, metric = name.rpartition("/")
        worse, better = ("lost", "gained") if test.right_or_wrong else ("lower", "higher")
        found = f"{test.lost} {worse}, {test.gained} {better} of {test.items}, p {_p(test.p)}"
        cells.append((printable(task), printable(_ROLES.get(metric, metric)), found))
    return (
        f"Compared with {printable(base)}:\n{_aligned(cells)}\n"
        "lost: right before and wrong now; gained: the reverse; lower, higher: the same of scores "
        "that are not 0 or 1,\nof a text how likely it is to the model. p: how often chance alone "
        "makes such a difference; below 0.05 it is hardly chance."
    )


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _row(name: str, metrics: dict[str, float], stage: str) -> _Row | None:
    kind, _, rest = name.removeprefix(f"{stage}/").partition("/")
    task, _, metric = rest.rpartition("/")
    value = _shown(name, metrics[name])
    if kind == "task":
        if metric in _SHAPES:
            return _Row(task, _SHAPES[metric], value, "", name)
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        if low is None or high is None:
            return None
        return _Row(task, _ROLES.get(metric, metric), value, f"{low:.1%} to {high:.1%}", name)
    if kind == "drift":
        return _Row(metric, "KL from base", value, "nats a token", name)
    if kind == "capability" and not name.endswith("_stderr"):
        error = metrics.get(f"{name}_stderr")
        interval = "" if error is None else f"± {_shown(name, _NORMAL_95 * error)}"
        return _Row(task or "all benchmarks", metric, value, interval, name)
    return None


def _shown(name: str, value: float) -> str:
    """A value with its unit: accuracies in per cent, all else as a number."""
    kind, metric = name.split("/")[1], name.rpartition("/")[2]
    if metric == "answer_words":
        return f"{value:.1f}"
    fraction = kind == "task" or (
        kind == "capability" and 0 <= value <= 1 and not metric.startswith(_NO_FRACTIONS)
    )
    if fraction:
        return f"{value:.1%}"
    return f"{value:.3f}"


def previous_metrics(folder: Path, stage: str) -> dict[str, float] | None:
    """The newest earlier value of each metric in a run.

    Args:
        folder: Where this command writes: the run's folder, or one below it.
        stage: val or test.

    Returns:
        Its metrics by name; None where there is none.
    """
    wanted = {"val": "validation", "test": "test"}[stage]
    if not re.fullmatch(r"(validate|test)-\d+", folder.name):
        return None  # no run of the command line
    run = folder.parent
    files = [run / "metrics.jsonl", *run.glob(f"{folder.name.partition('-')[0]}-*/metrics.jsonl")]
    files = [file for file in files if file.is_file() and file.parent != folder]
    found: dict[str, float] = {}
    for file in sorted(files, key=lambda path: path.stat().st_mtime):
        for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
            record: dict[str, Any] = json.loads(line)
            if record.get("stage") == wanted:
                numbers = {name: value for name, value in record.items() if "/" in name}
                found.update({name: x for name, x in numbers.items() if x is not None})
    return found or None
