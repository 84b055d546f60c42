"""The short form of `make soak`: killed and resumed several times, a run ends as one left alone."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.timeout(600)  # half a minute, or many on a busy machine
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its runs")
def test_run_killed_several_times_ends_as_the_one_left_alone() -> None:
    repository = Path(__file__).parents[1]
    # Seen: 4.6 MB within the run left alone, 5.5 MB between it and a resumed life.
    short = ["--steps=24", "--kill_after=6", "--tokens=8", "--most_growth=30", "--kills=2"]
    done = subprocess.run(
        [sys.executable, str(repository / "scripts" / "soak.py"), *short],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"kills survived (\d+),.* items compared (\d+), wrong 0;", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) >= 2
    # Two models and AdamW's state of some 20 tensors each, and 4 completions of 24 steps.
    assert int(found[2]) >= 4 * 20 + 24 * 4


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module("soak")


@pytest.fixture
def soak_compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module("soak_compare")


def test_too_few_kills_lost_steps_and_memory_each_fail_a_soak(soak: Any) -> None:
    def judged(kills: int = 2, lost: int = 3, more: float = 9.0, life: float = 9.0) -> list[str]:
        found: list[str] = soak.problems(soak.Killed(kills, [0, lost], []), 2, more, life, 10.0)
        return found

    assert judged() == []
    assert judged(kills=0) == ["only 0 kills, wanted at least 2"]
    assert judged(lost=4) == ["steps lost at a kill [0, 4], saved every 3"]
    assert judged(more=11.0) == [
        "memory grew +11.0 MB from the second quarter to the last, allowed +10.0"
    ]
    assert judged(life=11.0) == ["memory grew +11.0 MB in a life, allowed +10.0"]
    assert len(judged(more=math.inf)) == 1  # nothing was measured


def test_a_life_is_compared_with_the_whole_run_at_the_same_age(soak: Any) -> None:
    whole = [(step, 100.0 + step) for step in range(24)]
    same, larger = [(step, 100.0 + step) for step in range(6)], [(4, 150.0)]
    assert soak.resumed_growth([same, same], whole) == 0.0
    assert soak.resumed_growth([same, larger], whole) == 46.0
    assert soak.resumed_growth([], whole) == math.inf


def test_paths_of_the_two_runs_are_no_difference_and_all_else_is(soak_compare: Any) -> None:
    one = {"callbacks": {"a": {"path": "/r/one/last.ckpt", "best": {"/r/one/x": 1}}}}
    other = {"callbacks": {"a": {"path": "/r/two/last.ckpt", "best": {"/r/two/x": 1}}}}
    mine, theirs = soak_compare.without(one, "/r/one"), soak_compare.without(other, "/r/two")
    assert soak_compare.differences(mine, theirs, "") == []
    theirs["callbacks"]["a"]["best"]["/x"] = 2
    assert soak_compare.differences(mine, theirs, "") == [".callbacks.a.best./x"]
