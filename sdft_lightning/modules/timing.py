"""Seconds of each phase of a training step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor


class PhaseTimer:
    """Keeps the seconds of each phase, by name; waits for the GPU where there is one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started: dict[str, float] = {}

    def start(self, phase: str, device: torch.device) -> None:
        """Start the clock of a phase."""
        self._started[phase] = _now(device)

    def stop(self, phase: str, device: torch.device) -> float:
        """Stop it, and return its seconds."""
        self.seconds[phase] = _now(device) - self._started[phase]
        return self.seconds[phase]

    @contextmanager
    def timed(self, phase: str, device: torch.device) -> Iterator[None]:
        """Measure what happens inside."""
        self.start(phase, device)
        try:
            yield
        finally:
            self.stop(phase, device)


class TimedModule(L.LightningModule):
    """A module that logs the seconds of each phase of its optimizer steps.

    Attributes:
        timer: The phases of the micro-batch under way.
        completion_tokens: Tokens of completions that the micro-batch trains on; set by the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.timer = PhaseTimer()
        self.completion_tokens = 0
        self._window_seconds: Counter[str] = Counter()
        self._window_tokens = 0

    @property
    def window_ends(self) -> bool:
        """Whether the optimizer steps with the micro-batch under way."""
        return not self.trainer.fit_loop._should_accumulate()

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Measure the seconds of a phase of the step, for perf/<phase>_seconds."""
        return self.timer.timed(phase, self.device)

    def on_train_start(self) -> None:
        """Count from here: what an earlier fit left of a window is not of this one."""
        self._window_seconds.clear()
        self._window_tokens = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock of the micro-batch."""
        self.timer.start("step", self.device)

    def on_before_backward(self, loss: Tensor) -> None:
        """Start the clock of the backward pass."""
        self.timer.start("backward", self.device)

    def on_after_backward(self) -> None:
        """Stop it."""
        self.timer.stop("backward", self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the seconds of each phase of an optimizer step, and its completion tokens a second.

        They are summed over the micro-batches of its window, on this process.
        """
        self.timer.stop("step", self.device)
        self._window_seconds.update(self.timer.seconds)
        self._window_tokens += self.completion_tokens
        if not self.window_ends:
            return
        for phase, seconds in self._window_seconds.items():
            self.log(f"perf/{phase}_seconds", seconds)
        speed = self._window_tokens / self._window_seconds["step"]
        self.log("perf/tokens_per_second", speed, prog_bar=True)
        self._window_seconds.clear()
        self._window_tokens = 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
