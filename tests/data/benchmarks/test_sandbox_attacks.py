"""Ways out of the sandbox that were tried: each is refused, and none ends a run.

What is attacked stands in the test's own folder or in the sandbox; each attack is bounded.
"""

from __future__ import annotations

import platform
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sdft_lightning.data.benchmarks import sandbox
from sdft_lightning.data.benchmarks.sandbox import (
    REFUSED,
    CheckedProgram,
    SandboxLimits,
    run_program,
)
from sdft_lightning.errors import UserError

pytestmark = pytest.mark.attack


@pytest.fixture(autouse=True, scope="module")
def limited() -> None:
    """Skip where programs cannot be limited."""
    try:
        run_program("pass")
    except UserError as error:
        pytest.skip(str(error))


QUICK = SandboxLimits(seconds=3.0)
COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine(), 0)
# A system call without Python's own functions around it.
CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    return libc.syscall(number, *arguments), ctypes.get_errno()
"""


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
def test_a_unix_socket_outside_is_not_reached(tmp_path: Path, kind: str) -> None:
    server = socket.socket(socket.AF_UNIX, getattr(socket, kind))
    with server:
        path = tmp_path / "s"
        server.bind(str(path))
        path.chmod(0o777)
        server.setblocking(False)
        if kind == "SOCK_STREAM":
            server.listen()
        program = f"""
import socket
mine = socket.socket(socket.AF_UNIX, socket.{kind})
mine.connect({str(path)!r})
mine.send(b'run this')
"""
        outcome = run_program(program, QUICK)
        assert not outcome.passed
        assert "PermissionError" in outcome.reason
        with pytest.raises(BlockingIOError):
            server.accept() if kind == "SOCK_STREAM" else server.recv(9)


@pytest.mark.parametrize(
    "ends",
    [
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
        "socket.socketpair()",
    ],
)
def test_an_end_of_a_pair_does_not_reach_a_socket_outside_either(tmp_path: Path, ends: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        path = tmp_path / "s"
        server.bind(str(path))
        path.chmod(0o777)
        server.setblocking(False)
        program = f"""
import socket
one, other = {ends}
done = False
for reach in (lambda: one.sendto(b'run this', {str(path)!r}),
              lambda: (one.connect({str(path)!r}), one.send(b'run this'))):
    try:
        reach()
        done = True
    except OSError:
        pass
assert done
"""
        assert not run_program(program, QUICK).passed
        with pytest.raises(BlockingIOError):
            server.recv(9)


@pytest.mark.parametrize("family", ["AF_VSOCK", "AF_INET", "AF_NETLINK", "AF_ALG", "AF_PACKET"])
def test_sockets_of_all_families_are_refused(family: str) -> None:
    number = getattr(socket, family)
    outcome = run_program(f"import socket; socket.socket({number}, socket.SOCK_STREAM)", QUICK)
    assert not outcome.passed
    assert "PermissionError" in outcome.reason


def test_the_session_keyring_is_out_of_reach() -> None:
    add, _, control = (REFUSED[name][COLUMN] for name in ("add_key", "request_key", "keyctl"))
    session, read_id = -3, 0
    outcome = run_program(
        CALL + f"found = call({control}, {read_id}, {session}, 1), "
        f"call({add}, b'user', b'sdft_test', b'x', 1, -2)\n"
        "raise RuntimeError(found)"
    )
    assert outcome.reason == "RuntimeError: ((-1, 1), (-1, 1))"


def test_memory_that_counts_for_no_process_is_refused() -> None:
    get, make = REFUSED["shmget"][COLUMN], REFUSED["memfd_create"][COLUMN]
    outcome = run_program(
        CALL + f"raise RuntimeError((call({get}, 0, 1 << 20, 0o1600), call({make}, b'x', 0)))"
    )
    assert outcome.reason == "RuntimeError: ((-1, 1), (-1, 1))"


def test_every_call_of_the_table_is_refused() -> None:
    numbers = {name: each[COLUMN] for name, each in REFUSED.items() if each[COLUMN] is not None}
    program = (
        CALL + f"got = {{n: call(i, 0, 0, 0, 0, 0, 0) for n, i in {numbers}.items()}}\n"
        "raise RuntimeError([name for name, each in got.items() if each != (-1, 1)])"
    )
    assert run_program(program, QUICK).reason == "RuntimeError: []"


def test_new_namespaces_and_calls_that_are_too_new_are_refused() -> None:
    clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    numbers = (435, 463, 470, 1000, 0x40000000 | 41)  # clone3, later ones, one of x32
    program = (
        CALL + f"namespaces = [call({clone}, flag | 17, 0, 0, 0, 0)[1] for flag in "
        "(0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)]\n"
        f"raise RuntimeError(namespaces, [call(number)[1] for number in {numbers}])"
    )
    assert run_program(program).reason == f"RuntimeError: ({[1] * 7}, {[38] * 5})"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86-64")
def test_calls_of_the_32_bit_kind_end_the_program() -> None:
    # mov eax, 20 (getpid); int 0x80; ret
    program = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex('b814000000cd80c3'))
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
ctypes.CFUNCTYPE(ctypes.c_int)(address)()
"""
    outcome = run_program(program, QUICK)
    assert not outcome.passed
    assert "the program ended" in outcome.reason


def test_its_folder_holds_so_many_bytes_and_files() -> None:
    for program, limits in (
        ("for i in range(40): open(str(i), 'wb').write(bytes(1 << 20))", SandboxLimits()),
        ("for i in range(5000): open(str(i), 'w')", SandboxLimits()),
        ("for i in range(5000): os.mkdir(str(i))", SandboxLimits()),
        ("for i in range(9): open(str(i), 'w')", SandboxLimits(folder_files=8)),
        ("open('a', 'wb').write(bytes(1 << 20)); open('b', 'w').write('xy' * 4096)", _ONE_MB),
    ):
        outcome = run_program("import os\n" + program, limits)
        assert not outcome.passed, program
        assert "No space left on device" in outcome.reason


_ONE_MB = SandboxLimits(folder_mb=1)


def test_nothing_of_its_folder_lies_on_our_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found: list[list[Path]] = []
    remove = Path.rmdir
    monkeypatch.setattr(
        Path, "rmdir", lambda path: (found.append(list(path.iterdir())), remove(path))[1]
    )
    assert run_program("for i in range(4000): open(str(i), 'w')").passed
    assert found == [[]]  # so clean-up has nothing to do
    assert list(tmp_path.iterdir()) == []


def test_nothing_outside_can_be_changed_that_landlock_does_not_look_at(tmp_path: Path) -> None:
    # Rights and times are no reading or writing: every mount but its own is read-only.
    program = (
        "import errno, os\nfor change in (lambda p: os.chmod(p, 0o777), lambda p: os.utime(p)):\n"
        f"  try: change({str(tmp_path)!r})\n"
        "  except OSError as error: assert error.errno == errno.EROFS, error\n"
        "  else: raise SystemExit('changed')"
    )
    assert run_program(program) == (True, "passed")


ENDINGS = {
    "drains every descriptor and exits": (
        "import os\nfor fd in range(3, 64):\n  for way in ('self', 'thread-self', '1'):\n"
        "    try: os.read(os.open(f'/proc/{way}/fd/{fd}', os.O_NONBLOCK), 1 << 20)\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "writes what the launcher might take for a missing limit": (
        "import os\nfor fd in range(3, 64):\n"
        "  for text in (b'X', b'B', b'S', b'XX'):\n"
        "    try: os.write(fd, text)\n"
        "    except OSError: pass\nos._exit(97)"
    ),
    "closes every descriptor": "import os; os.closerange(0, 256); os._exit(98)",
    "closes and goes on": "import os; os.closerange(0, 256)",
    "kills its parent": "import os\nfor s in (9, 2, 15, 19): os.kill(1, s)\nos._exit(98)",
    "kills all": "import os; os.kill(-1, 9); os.kill(os.getpid(), 9)",
    "is killed": "import os; os.kill(os.getpid(), 11)",
    "stops": "import os; os.kill(os.getpid(), 19)",
    "exits": "raise SystemExit(97)",
    "leaves its group": "import os, time\nif os.fork(): os._exit(0)\nos.setsid(); time.sleep(99)",
    "sets its own limits to nothing": (
        "import resource\nfor each in range(16):\n"
        "  try: resource.setrlimit(each, (0, 0))\n"
        "  except (OSError, ValueError): pass\nopen('x', 'w').write('x')"
    ),
    "sets its parent's limits to nothing": (
        "import resource\nfor each in (0, 1, 7, 9): resource.prlimit(1, each, (0, 0))\n"
        "while True: pass"
    ),
    "raises what cannot be told": (
        "class E(Exception):\n  def __str__(self): raise KeyboardInterrupt\nraise E"
    ),
    "raises megabytes": "raise ValueError('x' * (64 << 20))",
    "recurses": "def f(): f()\ntry: f()\nfinally: f()",
    "never ends": "import signal\nfor s in (2, 15): signal.signal(s, lambda *a: 0)\nwhile 1: pass",
    "takes all processes": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "takes all memory": "kept = []\nwhile True: kept.append(bytearray(1 << 20))",
    "is no text of Python": "\0\ufffe(",
}


@pytest.mark.parametrize("how", ENDINGS)
def test_one_program_never_ends_a_run(how: str) -> None:
    outcome = run_program(ENDINGS[how], SandboxLimits(seconds=1.0))
    assert outcome.passed is False
    assert outcome.reason
    # Nor does it as an answer that is called.
    body = "\n".join("  " + line for line in ENDINGS[how].splitlines())
    called = CheckedProgram(f"def f():\n{body}\n", "f", "f()")
    assert run_program(called, SandboxLimits(seconds=0.5)).passed is False


def test_a_neighbor_that_takes_all_processes_takes_none_of_ours() -> None:
    from sdft_lightning.data.benchmarks.task_functions import passes

    bomb = (
        "import os, time\nfor _ in range(40):\n  try: os.fork()\n  except OSError: time.sleep(0.05)"
    )
    threads = (
        "import threading, time\ntime.sleep(0.5)\nall = [threading.Thread(target=time.sleep, "
        "args=(0.2,)) for _ in range(3)]\n[t.start() for t in all]\n[t.join() for t in all]"
    )
    assert passes([bomb, threads, bomb, threads], at_once=4)[1::2] == [True, True]


def test_what_passes_by_itself_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([(98, "fork: Resource temporarily unavailable"), (98, ""), (0, "")])
    monkeypatch.setattr(sandbox, "_launch", lambda *given: next(ends))
    monkeypatch.setattr(sandbox, "_PAUSES", (0.0, 0.0, 0.0))
    assert run_program("pass").passed
    monkeypatch.setattr(sandbox, "_launch", lambda *given: (98, "no process to be had"))
    with pytest.raises(UserError, match=r"cannot limit a program now \(no process to be had\)"):
        run_program("pass")


# What a kernel without it answers, asked through a filter that is put in front of ours: the number
# of the call, the value of its first argument (None: any), the error.
MISSING = {
    "seccomp": ((157, 167), 22, 22),
    "landlock": ((444, 444), None, 38),
    "mount": ((165, 40), None, 1),
    "mount_setattr": ((442, 442), None, 38),
    "unshare": ((272, 97), None, 1),
}


@pytest.mark.parametrize("name", MISSING)
def test_where_the_kernel_has_no_such_limit_a_sentence_stands_for_a_run(name: str) -> None:
    numbers, argument, error = MISSING[name]
    load, equal, leave, allow = 0x20, 0x15, 0x06, 0x7FFF0000
    steps = [(load, 0, 0, 0), (equal, 0, 1 if argument is None else 3, numbers[COLUMN])]
    if argument is not None:
        steps += [(load, 0, 0, 16), (equal, 0, 1, argument)]
    steps += [(leave, 0, 0, 0x00050000 | error), (leave, 0, 0, allow)]
    program = b"".join(struct.pack("=HBBI", *step) for step in steps)
    script = f"""
import ctypes
from sdft_lightning.errors import UserError
from sdft_lightning.data.benchmarks.sandbox import run_program
from sdft_lightning.data.benchmarks.sandbox_launcher import install_filter
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
install_filter(bytes.fromhex({program.hex()!r}))
try:
    print(run_program('pass'))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"this system cannot limit a program ([Errno {error}] {name}: " in done.stdout
    assert "leave tasks that run code out" in done.stdout


def test_a_machine_without_a_table_of_calls_gets_a_sentence_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdft_lightning.data.benchmarks import Benchmarks
    from sdft_lightning.data.benchmarks.tasks import load_tasks

    monkeypatch.setattr(sandbox.os, "uname", lambda: type("", (), {"machine": "riscv64"}))
    task = Path(__file__).parents[3] / "configs" / "benchmarks" / "humaneval.yaml"
    data = tmp_path / "humaneval" / "validation.jsonl"
    data.parent.mkdir()
    data.touch()
    with pytest.raises(UserError, match=r"64-bit x86_64 and aarch64, this is riscv64"):
        load_tasks(Benchmarks([str(task)], data_dir=str(tmp_path), allow_code_execution=True))


WORKING = {
    "threads": """
from concurrent.futures import ThreadPoolExecutor
def f():
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(abs, [-1, -2]))
""",
    "asyncio": """
import asyncio
async def g():
    one, other = await asyncio.gather(asyncio.sleep(0.01, 1), asyncio.to_thread(lambda: 2))
    return one + other
def f():
    return asyncio.run(g())
""",
    "asyncio's streams over a pair": """
import asyncio, socket
async def g():
    one, other = socket.socketpair()
    reader, kept = await asyncio.open_connection(sock=one)
    also_kept, writer = await asyncio.open_connection(sock=other)
    writer.writelines([b'1', b'2'])
    await writer.drain()
    return sum(map(int, (await reader.readexactly(2)).decode()))
def f():
    return asyncio.run(g())
""",
    "asyncio's subprocesses": """
import asyncio
async def g():
    child = await asyncio.create_subprocess_exec('echo', '3', stdout=asyncio.subprocess.PIPE)
    return int((await child.communicate())[0])
def f():
    return asyncio.run(g())
""",
    "subprocesses": """
import subprocess, sys
def f():
    quiet = dict(stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shell = subprocess.run('echo 1 | cat', shell=True, capture_output=True, check=True)
    python = subprocess.run([sys.executable, '-c', 'import json; print(2)'], check=True,
                            stdout=subprocess.PIPE, **quiet)
    return int(shell.stdout) + int(python.stdout)
""",
    "multiprocessing": """
import multiprocessing
def f():
    here, there = multiprocessing.Pipe()
    child = multiprocessing.Process(target=there.send, args=(3,))
    child.start()
    child.join()
    return here.recv()
""",
    "temporary files": """
import tempfile
def f():
    with tempfile.TemporaryFile() as file:
        return file.write(b'abc')
""",
}


@pytest.mark.parametrize("what", WORKING)
def test_what_honest_answers_use_still_works(what: str) -> None:
    assert run_program(CheckedProgram(WORKING[what], "f", "assert f() == 3")) == (True, "passed")
