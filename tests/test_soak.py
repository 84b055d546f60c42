"""The short form of `make soak`: killed and resumed several times, a run ends as one left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)  # half a minute, or many on a busy machine
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its runs")
def test_run_killed_several_times_ends_as_the_one_left_alone() -> None:
    repository = Path(__file__).parents[1]
    # Memory is judged by the long form: so few steps are still those in which it fills up.
    short = ["--steps=24", "--kill_after=6", "--tokens=8", "--most_growth=1000"]
    done = subprocess.run(
        [sys.executable, str(repository / "scripts" / "soak.py"), *short],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"kills survived (\d+),.* items compared (\d+), different 0;", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) >= 2
    # Two models and AdamW's state of some 20 tensors each, and 4 completions of 24 steps.
    assert int(found[2]) >= 4 * 20 + 24 * 4
