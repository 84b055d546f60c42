"""The script of `docs/python.md` is run as it stands, and its table names all that is offered."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sdft_lightning

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def script() -> str:
    found = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_script_has_at_most_15_lines() -> None:
    assert len([line for line in script().splitlines() if line.strip()]) <= 15


def test_front_page_shows_the_same_script() -> None:
    assert f"```python\n{script()}```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_page_tells_every_name_that_is_offered_and_no_other() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told == set(sdft_lightning.__all__)


@pytest.mark.slow
@pytest.mark.embedded
def test_script_trains_validates_and_exports_in_an_empty_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "`max_steps=2` reached" in done.stdout + done.stderr
    assert "val/task/task/teacher_accuracy" in done.stdout
    assert (tmp_path / "exported" / "model.safetensors").stat().st_size > 10**8
    assert (tmp_path / "exported" / "tokenizer.json").is_file()
