"""Seconds of the phases of a window: each is counted once, and none of an earlier micro-batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdft_lightning.modules.window import Timing


def test_phases_add_up_over_a_window_and_end_with_their_micro_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(
        device=torch.device("cpu"), log=lambda name, value, **_: logged.update({name: value})
    )
    timing, clock = Timing(module), [0.0]
    monkeypatch.setattr(timing, "_now", lambda: clock[0])

    def micro_batch(*phases: str) -> None:
        timing.start("step")
        for phase in phases:
            with timing.timed(phase):
                clock[0] += 1.0
        timing.end_micro_batch(tokens=5)

    timing.restart()
    micro_batch("rollout", "check", "check")  # a phase may come twice
    micro_batch("rollout")  # or not at all
    timing.log()
    assert logged == {
        "perf/step_seconds": 4.0,
        "perf/rollout_seconds": 2.0,
        "perf/check_seconds": 2.0,
        "perf/tokens_per_second": 2.5,
    }
