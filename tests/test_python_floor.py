"""The oldest Python is the same everywhere, and what is newer than it is found."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def vermin(path: Path) -> subprocess.CompletedProcess[str]:
    line = re.search(r"^VERMIN := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line is not None
    _, *options = shlex.split(line[1])
    command = [str(Path(sys.executable).parent / "vermin"), *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_place_names_the_same_oldest_python() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert PROJECT["tool"]["mypy"]["python_version"] == "3.11"
    named = [
        each
        for each in PROJECT["project"]["classifiers"]
        if re.search(r":: 3\.\d", each) is not None
    ]
    assert min(named) == "Programming Language :: Python :: 3.11"
    assert "-t=3.11-" in (ROOT / "Makefile").read_text()
    assert "sys.version_info < (3, 11)" in (ROOT / "scripts" / "setup.sh").read_text()
    told = {"README.md": "3.11 or newer", "CONTRIBUTING.md": ">= 3.11", "Makefile": ">= 3.11"}
    for name, text in told.items():
        assert f"Python {text}" in (ROOT / name).read_text()


@pytest.mark.parametrize(
    "newer", ["from itertools import batched", "import typing\n\nf = typing.override"]
)
def test_a_library_name_of_a_newer_python_is_found(tmp_path: Path, newer: str) -> None:
    path = tmp_path / "newer.py"
    path.write_text(f"{newer}\n")
    found = vermin(path)
    assert found.returncode == 1
    assert "requires !2, 3.12" in found.stdout


def test_the_name_long_does_not_hide_what_is_newer(tmp_path: Path) -> None:
    path = tmp_path / "newer.py"
    path.write_text("import itertools\n\nlong = list[int]\nf = itertools.batched\n")
    assert vermin(path).returncode == 1


@pytest.mark.parametrize("version", ["(3, 10, 13)", "(3, 9, 1)"])
def test_setup_refuses_an_older_python_in_a_sentence(tmp_path: Path, version: str) -> None:
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "setup.sh"
    script.write_bytes((ROOT / "scripts" / "setup.sh").read_bytes())
    old = tmp_path / "python3.10"
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -c "{code}" "$@"\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", str(script)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no Python >= 3.11" in done.stderr
    assert str(old) in done.stderr
    assert not (tmp_path / ".venv").exists()
