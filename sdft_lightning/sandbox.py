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

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import uuid
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
    try:
        source = program.encode()
    except UnicodeEncodeError as error:  # half of a character: no Python source either
        return Outcome(False, f"UnicodeEncodeError: {error}"[:200])
    folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
    process = _launch(folder, limits)
    try:
        # Some seconds for the launcher itself on a busy machine.
        _, written = process.communicate(source, timeout=limits.seconds + 5)
    except subprocess.TimeoutExpired:
        return Outcome(False, "timeout")
    finally:
        # The launcher's child is the first process of its namespace: with it all others end.
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(OSError):
            _remove(folder)
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


def _launch(folder: Path, limits: SandboxLimits) -> subprocess.Popen[bytes]:
    """Start the launcher, which reads the program from its stdin."""
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
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _remove(folder: Path) -> None:
    """Remove a folder of a program, however deep it nested others and whatever it forbade there.

    Inner folders are first moved to the top. `shutil.rmtree` calls itself for each level instead,
    up to Python 3.12, and a program can make more levels than Python may go down.
    """
    folder.chmod(0o700)
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        waiting = _clear(top, top)
        while waiting:
            name = waiting.pop()
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            try:
                waiting += _clear(inner, top)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    folder.rmdir()


def _clear(inner: int, top: int) -> list[str]:
    """Delete the files of an open folder and move its folders to `top`; returns their new names."""
    moved = []
    for entry in list(os.scandir(inner)):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.name, dir_fd=inner)
            continue
        _unlock(inner, entry.name)
        moved.append(uuid.uuid4().hex)  # none that the program could have taken
        os.rename(entry.name, moved[-1], src_dir_fd=inner, dst_dir_fd=top)
    return moved


def _unlock(parent: int, name: str) -> None:
    """Give ourselves all rights in a folder of the program, never in one that a link leads to."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{handle}", 0o700)
    finally:
        os.close(handle)
