"""Runs a Python program that nobody has read, in a process with limits; says whether it passed.

Not libseccomp: its Python binding is not on PyPI (it comes with a distribution, for that
distribution's Python), what is there is unmaintained since 2021 (pyseccomp), and the library itself
knows nothing of calls that are newer than it is. Here every call that is newer than the table does
not exist; its tests compare the numbers with the kernel's headers.

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
import errno
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

from sdft_lightning.errors import UserError

# The kernel's name of an architecture (AUDIT_ARCH_...) and the column of the tables below.
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Numbers on x86-64 and on arm64; None where there is no such call.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # Sockets that lead out of the program: Unix and vsock pass the network namespace by.
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "sendmmsg": (307, 269),
    "recvmmsg": (299, 243),
    # The kernel's keyrings.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Shared memory and queues that outlive a process, or count for no process.
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184),
    "mq_getsetattr": (245, 185),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # Work that the kernel does where no filter sees it.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    # Other processes: the one that runs the tests has the same user.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # Tracing, and what kernels were broken into by.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "lookup_dcookie": (212, 18),
    "syslog": (103, 116),
    "modify_ldt": (154, None),
    # Mounts, namespaces, files by number.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # The machine.
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "nfsservctl": (180, 42),
    "iopl": (172, None),
    "ioperm": (173, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
    "create_module": (174, None),
}
# Allowed with some arguments only.
LOOKED_AT = {"clone": (56, 220), "clone3": (435, 435), "socketpair": (53, 199)}
# Calls from here on are newer than the table (mseal, 462, is the newest in it). The numbers of
# x86-64's 32-bit mode (x32) lie far above.
_TOO_NEW = 463


# New namespaces of any kind: mount, cgroup, uts, ipc, user, pid, network.
_NAMESPACES = (
    0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
)
_AF_UNIX, _SOCK_STREAM, _SOCK_KINDS = 1, 1, 0xF

# Instructions: load a word, compare, combine, return (linux/filter.h).
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # where they are in seccomp_data
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE, _UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


def filter_program(machine: str) -> bytes:
    """The filter for a machine.

    Args:
        machine: Its architecture as `os.uname().machine` has it.

    Returns:
        Instructions of 8 bytes each, as `sock_filter`.

    Raises:
        UserError: If there is no table for the architecture, or Python runs in a 32-bit mode.
    """
    if machine not in _ARCHITECTURES or sys.maxsize < 2**32:
        raise UserError(
            f"sandbox: there is a filter for 64-bit {' and '.join(_ARCHITECTURES)}, this is "
            f"{machine} ({sys.maxsize.bit_length() + 1}-bit Python), so model-written code is not "
            "run. Leave tasks that run code out."
        )
    architecture, column = _ARCHITECTURES[machine]
    clone, clone3, socketpair = (numbers[column] for numbers in LOOKED_AT.values())
    numbers = [each[column] for each in REFUSED.values()]
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _TOO_NEW),
        (_RETURN, 0, 0, _UNKNOWN),
        # Its flags are behind a pointer, which a filter cannot follow; the C library takes clone.
        (_EQUAL, 0, 1, clone3),
        (_RETURN, 0, 0, _UNKNOWN),
    ]
    for number in numbers:
        if number is not None:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    steps += [
        (_EQUAL, 0, 4, clone),
        (_LOAD, 0, 0, _argument(0)),
        (_ANY_BIT, 0, 1, _NAMESPACES),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
        # asyncio wakes itself through a pair. Streams only: an end of a datagram pair may send to,
        # and connect to, any socket whose path it knows.
        (_EQUAL, 0, 6, socketpair),
        (_LOAD, 0, 0, _argument(0)),
        (_EQUAL, 0, 3, _AF_UNIX),
        (_LOAD, 0, 0, _argument(1)),
        (_AND, 0, 0, _SOCK_KINDS),
        (_EQUAL, 1, 0, _SOCK_STREAM),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _argument(place: int) -> int:
    """Where the low half of an argument is in seccomp_data, on little-endian machines."""
    return 16 + 8 * place


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
