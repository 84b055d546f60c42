"""The plan of a step's memory against what a process really takes, on the CPU in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

PERF = Path(__file__).parents[1] / "perf"
# Bytes and no seconds are compared, so that other work on the machine does not matter.
WITHIN = 0.10


def steps(monkeypatch: pytest.MonkeyPatch, model: str | None, **changes: Any) -> dict[str, Any]:
    """Two SDFT steps in a process of their own; what it reports."""
    monkeypatch.syspath_prepend(str(PERF))
    from workload import Workload, random_model

    if model is None:
        model = str(random_model(hidden_size=720, intermediate_size=1920, num_hidden_layers=24))
    workload = asdict(Workload(model=model, steps=2, **changes))
    command = [sys.executable, str(PERF / "ours.py"), "sdft", json.dumps(workload)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("embedded", {"micro_batch": 4, "new_tokens": 8}),
        (None, {"micro_batch": 2, "accumulate": 2, "new_tokens": 16}),
    ],
    ids=["embedded", "another-size"],
)
def test_peak_of_a_step_is_the_planned_one_within_a_tenth(
    monkeypatch: pytest.MonkeyPatch, model: str | None, changes: dict[str, Any]
) -> None:
    found = steps(monkeypatch, model, **changes)
    taken = found["peak_gigabytes"] - found["before_gigabytes"]
    print(f"taken {taken:.3f} GB, planned {found['planned_gigabytes']:.3f}")
    assert taken == pytest.approx(found["planned_gigabytes"], rel=WITHIN)
