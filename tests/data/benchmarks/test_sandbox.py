"""Model-written code: what passes, what fails, and what must do no harm."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sdft_lightning.data.benchmarks.sandbox import SandboxLimits, run_program
from sdft_lightning.errors import UserError


def sandbox_works() -> bool:
    try:
        return run_program("pass").passed
    except UserError:
        return False


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not sandbox_works(),
    reason="this system has no Landlock or does not allow namespaces",
)
QUICK = SandboxLimits(seconds=3.0)


@pytest.mark.parametrize(
    ("program", "passed", "reason"),
    [
        ("assert 1 + 1 == 2", True, "passed"),
        ("import math, json, collections, re, typing, heapq, hashlib, random", True, "passed"),
        ("assert 1 + 1 == 3, 'wrong sum'", False, "AssertionError: wrong sum"),
        ("def f(:", False, "SyntaxError"),
        ("raise SystemExit(0)", False, "SystemExit"),
        ("import os; os._exit(3)", False, ""),
        ("import os; os._exit(0)", False, ""),
        ("import os; os._exit(97)", False, ""),
        (
            "import os\nfor fd in range(3, 60):\n  try: os.write(fd, b'P')\n"
            "  except OSError: pass\nos._exit(0)",
            False,
            "",
        ),
        ("open('mine.txt', 'w').write('x'); assert open('mine.txt').read() == 'x'", True, "passed"),
    ],
)
def test_a_program_passes_only_by_coming_to_its_end(
    program: str, passed: bool, reason: str
) -> None:
    outcome = run_program(program)
    assert outcome.passed == passed
    assert reason in outcome.reason


def test_an_endless_loop_ends_as_timeout() -> None:
    start = time.monotonic()
    outcome = run_program("while True: pass", SandboxLimits(seconds=1.0))
    assert not outcome.passed
    assert outcome.reason == "timeout"
    assert time.monotonic() - start < 8


def test_sleeping_counts_as_time_too() -> None:
    assert (
        run_program("import time; time.sleep(60)", SandboxLimits(seconds=1.0)).reason == "timeout"
    )


def test_a_fork_bomb_ends_with_all_its_processes() -> None:
    before = processes_of("bomb_marker")
    outcome = run_program(
        "import os\nbomb_marker = 1\nwhile True:\n    os.fork()", SandboxLimits(seconds=2.0)
    )
    assert not outcome.passed
    time.sleep(0.3)
    assert processes_of("sandbox_launcher") == before == 0


def processes_of(word: str) -> int:
    listed = subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True)
    return sum(word in line for line in listed.stdout.splitlines())


def test_a_flood_of_output_is_thrown_away() -> None:
    program = "import os\nwhile True:\n  os.write(1, b'x' * 65536); os.write(2, b'x' * 65536)"
    assert run_program(program, SandboxLimits(seconds=1.0)).reason == "timeout"


def test_a_process_in_a_session_of_its_own_ends_too() -> None:
    program = "import os, time\nif os.fork() == 0:\n  os.setsid(); time.sleep(60)"
    assert run_program(program, QUICK).passed
    time.sleep(0.3)
    assert processes_of("sandbox_launcher") == 0


def test_ten_gigabytes_are_refused() -> None:
    outcome = run_program("x = bytearray(10 * 2**30)", QUICK)
    assert not outcome.passed
    assert "MemoryError" in outcome.reason


def test_killing_other_processes_reaches_none() -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = f"""
import os, signal
for pid in ({victim.pid}, {os.getpid()}, {os.getppid()}):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
try:
    os.kill(-1, signal.SIGKILL)
except OSError:
    pass
os.kill({victim.pid}, signal.SIGKILL)
"""
        outcome = run_program(program, QUICK)
        assert not outcome.passed
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_writing_outside_its_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    mine = tmp_path / "kept.txt"
    mine.write_text("mine")
    mine.chmod(0o666)
    for program in (
        f"open({str(mine)!r}, 'w').write('theirs')",
        f"import os; os.remove({str(mine)!r})",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"open({str(tmp_path / 'new.txt')!r}, 'w')",
        "open('/tmp/sdft_lightning_sandbox_test', 'w')",
        f"import os; os.rename({str(mine)!r}, 'stolen')",
    ):
        outcome = run_program(program, QUICK)
        assert not outcome.passed, program
        assert "PermissionError" in outcome.reason or "OSError" in outcome.reason, outcome
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.txt"]


def test_private_files_cannot_be_read(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    for path in (token, Path("/etc/hostname"), Path(__file__)):
        outcome = run_program(f"open({str(path)!r}).read()", QUICK)
        assert not outcome.passed
        assert "PermissionError" in outcome.reason


def test_there_is_no_network() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run_program(
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)", QUICK
        )
    assert not outcome.passed
    assert "OSError" in outcome.reason or "Error" in outcome.reason


def test_a_large_file_is_refused() -> None:
    outcome = run_program("f = open('big', 'wb')\nfor _ in range(9): f.write(b'x' * 2**20)", QUICK)
    assert not outcome.passed


def test_it_sees_none_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program("import os; assert 'HF_TOKEN' not in os.environ", QUICK).passed
    assert not run_program(
        "import os; open('/proc/1/environ').read().index('secret')", QUICK
    ).passed


def test_its_folder_is_empty_and_removed() -> None:
    outcome = run_program("import os; raise RuntimeError(os.getcwd() + str(os.listdir('.')))")
    folder, _, rest = outcome.reason.removeprefix("RuntimeError: ").partition("[")
    assert rest == "]"
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        # More levels than Python's own shutil.rmtree can go down.
        ("import os\nfor _ in range(3000):\n  os.mkdir('d'); os.chdir('d')", True),
        ("import os; os.makedirs('a/b/c'); os.chmod('a/b', 0); os.chmod('a', 0)", True),
        ("import os; os.mkdir('a'); os.chmod('.', 0); assert 0", False),
        ("import os; os.makedirs('a/b'); open('a/b/f', 'w'); os.symlink('a', 'b')", True),
    ],
)
def test_its_folder_is_removed_whatever_it_made_there(
    program: str, passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_program(program).passed == passed
    assert list(tmp_path.iterdir()) == []


def test_what_its_links_point_to_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o755)
    (mine / "kept.txt").write_text("mine")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    links = f"import os; os.mkdir('a'); os.symlink({str(mine)!r}, 'a/b'); os.symlink('/', 'c')"
    assert run_program(links).passed
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (mine / "kept.txt").read_text() == "mine"
    assert mine.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("program", ["x = '\ud800'", "x = '\0'"])
def test_text_that_is_no_source_is_a_failed_item(program: str) -> None:
    outcome = run_program(program)
    assert not outcome.passed
    assert "Error" in outcome.reason


@pytest.mark.parametrize("name", ["seconds", "memory_mb", "file_mb", "processes"])
def test_limits_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"sandbox.{name}: got 0"):
        SandboxLimits(**{name: 0})
