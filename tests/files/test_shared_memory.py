"""What killed runs have left in shared memory goes; what living ones use, and others', stays."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sdft_lightning.files import shared_memory
from sdft_lightning.files.shared_memory import clear_shared_memory, new_weights_folder

OTHER_RUN = """
import sys
from pathlib import Path
from sdft_lightning.files.shared_memory import new_weights_folder
folder, lock = new_weights_folder(Path(sys.argv[1]))
(folder / "weights-1").mkdir()
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(shared_memory, "MEMORY", folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def dead() -> int:
    """Number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("by", ["the next command", "the next weights"])
def test_weights_of_a_killed_run_go_and_those_of_a_living_one_stay(memory: Path, by: str) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", OTHER_RUN, str(memory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert run.stdout is not None
    assert run.stdin is not None

    def clear() -> None:
        if by == "the next command":
            clear_shared_memory()
        else:
            shared_memory.remove_weights_folder(*new_weights_folder(memory))

    left = Path(run.stdout.readline().strip())
    try:
        clear()
        assert (left / "weights-1").is_dir()
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdin.close()
        run.stdout.close()
    clear()
    assert list(memory.iterdir()) == []


def test_tensors_of_dead_processes_go_and_nothing_else(memory: Path, dead: int) -> None:
    kept = [
        f"torch_{os.getpid()}_1_0",  # its process lives
        f"torch_{dead}_1_1",  # mapped by a process that lives
        f"torch_{dead}_link_0",
        f"torch_{dead}",
        "torch_99999999999999999999999_1_0",
        "psm_0a1b2c3d",  # whose?
        "sem.mp-abcdefgh",
        "sdft-weights-abcdefgh",
    ]
    for name in (*kept, f"torch_{dead}_1_0", f"torch_{dead}_2"):
        (memory / name).write_bytes(b"x" * 8)
    (memory / f"torch_{dead}_3_0").symlink_to(memory / "psm_0a1b2c3d")
    with (memory / kept[1]).open("r+b") as file, mmap.mmap(file.fileno(), 0):
        clear_shared_memory()
    assert {path.name for path in memory.iterdir()} == {*kept, f"torch_{dead}_3_0"}


def test_nothing_of_other_users_goes(
    memory: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (memory / f"torch_{dead}_1_0").write_bytes(b"")
    (memory / f"sdft-weights-{dead}-abc").mkdir()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    clear_shared_memory()
    assert len(list(memory.iterdir())) == 2


def test_container_that_does_not_see_all_processes_leaves_their_tensors(
    memory: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (memory / f"torch_{dead}_1_0").write_bytes(b"")
    monkeypatch.setattr(shared_memory, "_HOST_MEMORY", os.stat("/proc/self/ns/ipc").st_ino)
    monkeypatch.setattr(shared_memory, "_HOST_PROCESSES", 1)
    clear_shared_memory()
    assert len(list(memory.iterdir())) == 1
    monkeypatch.setattr(shared_memory, "_HOST_PROCESSES", os.stat("/proc/self/ns/pid").st_ino)
    clear_shared_memory()
    assert list(memory.iterdir()) == []


def test_every_command_clears_before_it_works(
    memory: Path, dead: int, run_cli: Callable[..., None], fit_args: list[str]
) -> None:
    (memory / f"torch_{dead}_1_0").write_bytes(b"")
    (memory / f"sdft-weights-{dead}-abc").mkdir()
    run_cli(*fit_args, "--trainer.max_steps=1")
    assert [path.name for path in memory.iterdir() if str(dead) in path.name] == []
