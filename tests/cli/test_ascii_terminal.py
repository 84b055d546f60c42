"""A terminal, or a file, that knows ASCII only ends no command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sdft_lightning.errors import print_anything

ROOT = Path(__file__).parents[2]
LATIN = {"PYTHONIOENCODING": "ascii"}
BARE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

# All in one process: each start takes seconds.
COMMANDS = """
import sys
from sdft_lightning.cli import main
for words in {commands!r}:
    print("=== " + words[0], flush=True)
    try:
        main(words)
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise
print("=== done", sys.stdout.encoding)
"""


@pytest.mark.parametrize("environment", [LATIN, BARE], ids=["output", "locale"])
def test_help_validation_report_and_errors_are_printed(
    environment: dict[str, str],
    tmp_path: Path,
    model_folder: Path,
    write_rows: Callable[..., Path],
) -> None:
    row = {"prompt": "Où est → 你", "demonstration": "é", "reference": "é"}
    path = write_rows([row, row])
    validate = [
        "validate",
        "--model=SDFTModule",
        f"--model.policy.name={model_folder}",
        f"--data.validation={path}",
        "--data.grader=contains",
        f"--data.name={'tâche' if environment is LATIN else 'tache'}",
        "--data.columns.reference=reference",
        "--data.prompts.style=turns",
        "--model.evaluation.max_new_tokens=4",
        "--trainer.accelerator=cpu",
        f"--run.root={tmp_path}",
        # Of a file's name or an option, a locale of ASCII knows ASCII only.
        f"--run.name={'é' if environment is LATIN else 'e'}",
        '--trainer.callbacks=[{"class_path": "CompletionLog"}]',
    ]
    commands = [["--help"], ["fit", "--help"], validate]
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LC_", "LANG", "PYTHONUTF8", "PYTHONIOENCODING"))
    }
    script = tmp_path / "commands.py"
    script.write_text(COMMANDS.format(commands=commands), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode(errors="replace")
    assert done.returncode == 0, err[-3000:]
    assert "UnicodeEncodeError" not in err
    assert "=== done ascii" in out
    assert "accuracy" in out


def test_report_of_such_a_run_and_its_errors_are_printed(tmp_path: Path) -> None:
    (tmp_path / "continual_é").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "sdft_lightning.cli", "report", "continual_é→"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **LATIN},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"continual_" in done.stderr


def test_characters_that_an_encoding_lacks_become_question_marks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("out", "err")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, f"std{name}", stream)
    print_anything()
    for stream in streams.values():
        print("±0.3 – 你 \ud800 b", file=stream, flush=True)
        assert stream.buffer.getvalue() == b"?0.3 ? ? ? b\n"  # type: ignore[attr-defined]


def test_streams_of_notebooks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    print_anything()
    print(json.dumps("é", ensure_ascii=False))
    assert stream.getvalue() == '"é"\n'
