"""Runs a Python program that nobody has read, in a process with limits, and says whether it passed.

Not a virtual machine: it keeps a language model's careless code from harm, and most of its malice.
The process has no network and reaches no other process (namespaces of Linux); it reads the system's
and Python's own files only and writes only into an empty folder of its own (Landlock); it runs as
nobody where we are root, and has limits on time, memory, file size and processes. Where the system
lacks what a limit needs, nothing is run at all.

What it does not prevent: filling the disk with many small files until its time is over; where we
are not root, changing the permissions of the user's own files and talking to Unix sockets that the
user may talk to; a program that finds the launcher's secret in its own process and feigns success.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdft_lightning.errors import UserError

_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
# What the launcher exits with where it could not set a limit.
_NO_SANDBOX = 97


@dataclass(frozen=True)
class SandboxLimits:
    """What a program may use.

    Args:
        seconds: Wall-clock time, and processor time of each process.
        memory_mb: Address space of each process, in megabytes.
        file_mb: Size of a file, in megabytes.
        processes: Processes and threads at once.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 1
    processes: int = 4

    def __post_init__(self) -> None:
        """Refuse values that allow nothing."""
        for name in ("seconds", "memory_mb", "file_mb", "processes"):
            if getattr(self, name) <= 0:
                raise UserError(f"sandbox.{name}: got {getattr(self, name)}, allowed is above 0.")


class Outcome(NamedTuple):
    """How a program ended.

    Attributes:
        passed: It came to its end without an error.
        reason: `passed`, `timeout`, or the last line of what it wrote to stderr.
    """

    passed: bool
    reason: str


def run_program(program: str, limits: SandboxLimits = SandboxLimits()) -> Outcome:
    """Run a program and wait for its end.

    Args:
        program: Python source.
        limits: What it may use.

    Returns:
        How it ended; all of its processes are gone and its folder is removed.

    Raises:
        UserError: If this system cannot set the limits.
    """
    if sys.platform != "linux":
        raise UserError(
            f"sandbox: model-written code runs on Linux only, this is {sys.platform}. Leave tasks "
            "that run code out."
        )
    folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
    folder.chmod(0o777)  # the program may run as nobody
    command = [
        sys.executable,
        "-I",
        str(_LAUNCHER),
        str(folder),
        str(limits.seconds),
        str(limits.memory_mb << 20),
        str(limits.file_mb << 20),
        str(limits.processes),
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        # Some seconds for the launcher itself on a busy machine.
        _, written = process.communicate(program.encode(), timeout=limits.seconds + 5)
    except subprocess.TimeoutExpired:
        return Outcome(False, "timeout")
    finally:
        # The launcher's child is the first process of its namespace: with it all others end.
        for kill in (os.killpg, os.kill):
            try:
                kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    text = written.decode(errors="replace").strip()
    if process.returncode == _NO_SANDBOX:
        raise UserError(
            f"sandbox: this system cannot limit a program ({text or 'no reason given'}), so model-"
            "written code is not run. It needs Linux 6.2 with Landlock and user namespaces; leave "
            "tasks that run code out."
        )
    if process.returncode == 0:
        return Outcome(True, "passed")
    reason = text.splitlines()[-1] if text else f"exit code {process.returncode}"
    return Outcome(False, reason[:200])
