"""Seconds of each phase of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
