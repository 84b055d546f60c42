"""Runs a Python program that nobody has read, in a process with limits, and says whether it passed.

Not a virtual machine: it keeps a language model's careless code from harm, and most of its malice.
The process has no network and reaches no other process (namespaces of Linux); it reads the system's
and Python's own files only (Landlock), and writes only into an empty mount of limited size;
sockets, keys, shared memory and more are refused call by call (seccomp); it runs as a user that
owns nothing where we are root, and has limits on time, memory, file size and processes. Where the
system lacks what a limit needs, nothing is run at all. docs/security.md says what is promised and
what is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdft_lightning.data.benchmarks.sandbox_filter import filter_program
from sdft_lightning.errors import UserError

_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
# What the launcher exits with where a limit cannot be set, and where it cannot be set now.
_NO_SANDBOX, _BUSY = 97, 98
# Seconds before each further try on a busy machine: in all longer than a neighbor may run.
_PAUSES = (0.2, 1.0, 3.0, 10.0)
# Seconds that setting the limits may take on a busy machine, besides the program's own.
_SETTING_UP = 60.0


@dataclass(frozen=True)
class SandboxLimits:
    """What a program may use.

    Args:
        seconds: Wall-clock time, and processor time of each process.
        memory_mb: Address space of each process, in megabytes.
        file_mb: Size of a file, in megabytes.
        processes: Processes and threads at once.
        folder_mb: Size of all files in the working folder, in megabytes; they are in memory.
        folder_files: Files and folders in the working folder.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 1
    processes: int = 4
    folder_mb: int = 16
    folder_files: int = 4096

    def __post_init__(self) -> None:
        """Refuse values that allow nothing."""
        for name in vars(self):
            if getattr(self, name) <= 0:
                raise UserError(f"sandbox.{name}: got {getattr(self, name)}, allowed is above 0.")


@dataclass(frozen=True)
class CheckedProgram:
    """A program with tests that call one of its functions.

    The tests run in a process of their own. Arguments and results pass between the two as plain
    data, so an answer to a call is all that the program can do for its tests to pass.

    Args:
        source: Python source of the program.
        function: Name of the function that the tests call.
        test: Python source of the tests; they pass by coming to their end.
        given: Python source that runs ahead of the tests, with helpers that they use.
    """

    source: str
    function: str
    test: str
    given: str = ""


class Outcome(NamedTuple):
    """How a program ended.

    Attributes:
        passed: It came to its end without an error, and so did its tests.
        reason: `passed`, `timeout`, or what was raised.
    """

    passed: bool
    reason: str


def run_program(program: str | CheckedProgram, limits: SandboxLimits = SandboxLimits()) -> Outcome:
    """Run a program and wait for its end.

    Args:
        program: Python source, which passes by coming to its end (and might feign that); or one
            with tests, which decide.
        limits: What it may use.

    Returns:
        How it ended; all of its processes are gone and so is its folder.

    Raises:
        UserError: If this system cannot set the limits; never for what a program does.
    """
    if sys.platform != "linux":
        raise UserError(
            f"sandbox: model-written code runs on Linux only, this is {sys.platform}. Leave tasks "
            "that run code out."
        )
    if isinstance(program, str):
        program = CheckedProgram(program, "", "")
    try:
        source = program.source.encode()
    except UnicodeEncodeError as error:  # half of a character: no Python source either
        return Outcome(False, f"UnicodeEncodeError: {error}"[:200])
    tests = {"function": program.function, "test": program.test, "given": program.given}
    sent = struct.pack("Q", len(source)) + source + json.dumps(tests).encode()
    text = ""
    for pause in (*_PAUSES, 0.0):
        try:
            code, text = _launch(sent, limits)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timeout")
        except OSError as error:  # no process or folder to be had
            code, text = _BUSY, str(error)
        if code != _BUSY:
            break
        time.sleep(pause)
    if code in (_NO_SANDBOX, _BUSY):
        now = " now" if code == _BUSY else ""
        raise UserError(
            f"sandbox: this system cannot limit a program{now} ({text or 'no reason given'}), so "
            "model-written code is not run. It needs Linux 6.2 with Landlock, seccomp, and user "
            "and mount namespaces; leave tasks that run code out."
        )
    if code == 0:
        return Outcome(True, "passed")
    return Outcome(False, (text.splitlines()[-1] if text else f"exit code {code}")[:200])


def _launch(sent: bytes, limits: SandboxLimits) -> tuple[int, str]:
    """Send a program to a launcher; returns its exit code and what it says."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-"))  # where the program's own is mounted
    try:
        process = subprocess.Popen(
            _command(folder, limits),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            _, said = process.communicate(sent, timeout=limits.seconds + _SETTING_UP)
        finally:
            # The launcher's child is the first process of its namespace: with it all others end.
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        folder.rmdir()
    return process.returncode, said.decode(errors="replace").strip()


def _command(folder: Path, limits: SandboxLimits) -> list[str]:
    return [
        sys.executable,
        "-I",
        str(_LAUNCHER),
        str(folder),
        str(limits.seconds),
        str(limits.memory_mb << 20),
        str(limits.file_mb << 20),
        # The one that runs the tests counts, too, and where we are not root, so does the launcher.
        str(limits.processes + (1 if os.geteuid() == 0 else 2)),
        str(limits.folder_mb << 20),
        str(limits.folder_files),
        filter_program(os.uname().machine).hex(),
    ]
