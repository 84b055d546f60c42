"""Files of records after a kill, and locks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdft_lightning.continual.drive import _held
from sdft_lightning.errors import UserError
from sdft_lightning.files import whole_files
from sdft_lightning.files.run_folder import append_lines
from sdft_lightning.files.whole_files import append_record, read_records, repair_records


@pytest.mark.parametrize("cut", ['{"run": "b", "acc', '{"run": "b"}', "{", '{"run": "ü'])
def test_torn_last_line_is_left_out_and_repaired(cut: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_record(path, {"run": "a"})
    with path.open("ab") as file:
        file.write(cut.encode()[: 15 if "ü" in cut else None])
    assert read_records(path) == [{"run": "a"}]
    repair_records(path)
    append_record(path, {"run": "c"})
    assert path.read_text() == '{"run": "a"}\n{"run": "c"}\n'


def test_repair_of_a_whole_file_and_of_none_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    repair_records(path)
    assert not path.exists()
    append_record(path, {"run": "a"})
    repair_records(path)
    assert path.read_text() == '{"run": "a"}\n'


def test_only_line_torn_leaves_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"run"')
    repair_records(path)
    assert path.read_text() == ""
    assert read_records(path) == []


def test_malformed_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"run": "a"}\n{"ru\n{"run": "c"}\n')
    with pytest.raises(UserError, match=r"results\.jsonl, line 2"):
        read_records(path)


def test_a_torn_log_line_goes_before_the_next_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    append_lines(path, [{"step": 2}, {"step": 3}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


HOLDER = """
import subprocess, sys, time
from pathlib import Path
from sdft_lightning.files.whole_files import held_lock
with held_lock(Path(sys.argv[1]), str) as number:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                             pass_fds=(number,))
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_lock_outlives_a_killed_process_as_long_as_its_child_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_files, "_LOCK_PAUSE", 0.01)
    path = tmp_path / "locks" / "a.lock"
    repository = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        with pytest.raises(UserError, match=f"another process works on the chain .*{process.pid}"):
            with _held(path, "the chain"):
                pass
    finally:
        os.kill(child, 9)
    monkeypatch.setattr(whole_files, "_LOCK_PAUSE", 0.5)
    start = time.monotonic()
    with _held(path, "the chain"):
        assert time.monotonic() - start < 10
