"""Progress of a run: loss, KL, tokens per second and the time that is left."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from sdft_lightning.errors import check_at_least
from sdft_lightning.errors.foreign_text import printable


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
