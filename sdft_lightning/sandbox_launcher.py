"""The other side of `sandbox`: a script that gives up its rights, then runs what it reads.

    python -I sandbox_launcher.py FOLDER SECONDS MEMORY FILE_SIZE PROCESSES < program

It imports nothing of the project. Three processes: this one waits; its child enters new namespaces
(user, process ids, network, ipc) and waits; the grandchild, first of the new process-id namespace,
is limited and runs the program. When it ends, the kernel ends all that it has started.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
import time

_CLONE_NEWIPC, _CLONE_NEWUSER = 0x08000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 1, 8, 38
_CAPABILITY_VERSION, _CAP_DAC_READ_SEARCH = 0x20080522, 2
# The same numbers on x86-64 and arm64.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ, _READ_DIR, _EXECUTE = 1 << 2, 1 << 3, 1 << 0
_ALL_OF_VERSION_3 = (1 << 15) - 1
_NOBODY = 65534
NO_SANDBOX = 97

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def enter_namespaces() -> None:
    """No network, no other processes to see or signal, and no rights over what is outside."""
    flags = _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC
    if os.geteuid() != 0:
        flags |= _CLONE_NEWUSER
    _call("unshare", _libc.unshare(flags))


def confine(folder: str) -> None:
    """Landlock: read the system's and Python's own files, write in `folder` only."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    _call("landlock", version)
    if version < 3:
        raise OSError(0, f"landlock: version {version} cannot forbid to cut files short")
    handled = _ALL_OF_VERSION_3
    attributes = ctypes.create_string_buffer(struct.pack("Q", handled))
    ruleset = _call("landlock", _libc.syscall(_LANDLOCK_CREATE, attributes, 8, 0))
    readable = {sys.base_prefix, sys.prefix, "/usr", "/lib", "/lib64", "/bin", "/dev/urandom"}
    rules = [(path, _READ | _READ_DIR | _EXECUTE) for path in readable if os.path.isdir(path)]
    rules += [(path, _READ) for path in readable if os.path.exists(path) != os.path.isdir(path)]
    for path, allowed in [*rules, (folder, handled)]:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, descriptor))
        _call("landlock", _libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0))
        os.close(descriptor)
    _call("prctl", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _call("landlock", _libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def limit(seconds: float, memory: int, file_size: int, processes: int) -> None:
    """Limits of the kernel on each process; the number of processes counts for a user."""
    for name, value in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(name, (value, value))


def become_nobody() -> None:
    """Give up root: its limit on processes does not hold, and it may signal anyone.

    An ordinary user keeps its id and gives up the rights that its new namespace gave it. Root keeps
    the right to pass through folders, as Python may lie in a private one; what can be read there,
    Landlock says.
    """
    kept = 0
    if os.geteuid() == 0:
        _call("prctl", _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        kept = 1 << _CAP_DAC_READ_SEARCH
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    _call("capset", _libc.capset(header, data))


def wait(child: int, seconds: float) -> int:
    """The exit code of a child; it is killed when the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("timeout", file=sys.stderr, flush=True)
    return 1


def report(pipe: int, kind: bytes, text: str = "") -> None:
    """Tell the launcher: S the limits are set, P the program came to its end, E it failed."""
    os.write(pipe, kind + text.encode(errors="replace")[:300])


def run(program: str, pipe: int, token: bytes) -> None:
    """Run the program in this process, its output thrown away, and report how it ended."""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        report(pipe, b"E", f"{type(error).__name__}: {error}")
        os._exit(1)
    report(pipe, b"P" + token)
    os._exit(0)


def main() -> None:
    """Read the program, give up all rights, run it."""
    folder = sys.argv[1]
    seconds, memory, file_size, processes = (float(argument) for argument in sys.argv[2:])
    program = sys.stdin.read()
    # An exit code proves nothing: a program may exit with any. What it does not know is the token.
    token = os.urandom(16)
    inlet, pipe = os.pipe()
    try:
        enter_namespaces()
        child = os.fork()
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(NO_SANDBOX)
    if child:
        os.close(pipe)
        code = wait(child, seconds)
        os.set_blocking(inlet, False)
        told = os.read(inlet, 4096)
        if told[:1] != b"S":
            print(told[1:].decode(errors="replace"), file=sys.stderr, flush=True)
            os._exit(NO_SANDBOX)
        if told[1:2] == b"E":
            print(told[2:].decode(errors="replace"), file=sys.stderr, flush=True)
        os._exit(0 if code == 0 and told == b"SP" + token else 1)
    os.close(inlet)
    try:
        os.chdir(folder)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(nothing, descriptor)
        become_nobody()
        # After the change of user, which clears it.
        _call("prctl", _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        confine(folder)
        limit(seconds, int(memory), int(file_size), int(processes))
    except (OSError, ValueError) as error:
        report(pipe, b"X", str(error))
        os._exit(1)
    report(pipe, b"S")
    run(program, pipe, token)


if __name__ == "__main__":
    main()
