"""Seconds of each phase of a training step."""

from __future__ import annotations

import time
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
    """A module that logs the seconds of each phase of its steps.

    Attributes:
        timer: The phases of the step under way.
        completion_tokens: Tokens of completions that the step trains on; set by the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.timer = PhaseTimer()
        self.completion_tokens = 0

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Measure the seconds of a phase of the step, for perf/<phase>_seconds."""
        return self.timer.timed(phase, self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock of the step."""
        self.timer.start("step", self.device)

    def on_before_backward(self, loss: Tensor) -> None:
        """Start the clock of the backward pass."""
        self.timer.start("backward", self.device)

    def on_after_backward(self) -> None:
        """Stop it."""
        self.timer.stop("backward", self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the seconds of each phase, and completion tokens per second of the whole step."""
        step = self.timer.stop("step", self.device)
        for phase, seconds in self.timer.seconds.items():
            self.log(f"perf/{phase}_seconds", seconds)
        self.log("perf/tokens_per_second", self.completion_tokens / step, prog_bar=True)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
