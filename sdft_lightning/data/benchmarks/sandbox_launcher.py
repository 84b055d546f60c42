"""The other side of `sandbox`: a script that gives up its rights, then runs what it reads.

    python -I sandbox_launcher.py FOLDER SECONDS MEMORY FILE_SIZE PROCESSES FOLDER_SIZE FILES FILTER
        < length of the program, the program, JSON of its tests

It imports nothing of the project. The launcher enters new namespaces (mounts, process ids, network,
ipc; user, where it is not root) and waits. Its child, first of the new process ids, gives up all
rights, then forks the program, and is its judge: it runs the tests, and only it can tell the
launcher of their end. The program has its own memory, no descriptor but two pipes to the judge, and
knows nothing of the tests but the arguments of the calls. When the judge ends, the kernel ends all
that the program has started.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import functools
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_PRIVATE = 2, 4, 1 << 18
_MOUNT_READ_ONLY, _AT_CWD, _AT_RECURSIVE = 1, -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP = 1, 4, 8, 22
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 38, 47, 2
_CAPABILITY_VERSION, _CAP_DAC_READ_SEARCH = 0x20080522, 2
# The same numbers on x86-64 and arm64.
_MOUNT_SETATTR = 442
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ, _WRITE, _READ_DIR, _EXECUTE = 1 << 2, 1 << 1, 1 << 3, 1 << 0
_ALL_OF_VERSION_3 = (1 << 15) - 1
# Users that own nothing (systemd's range for such): one for each program, as the kernel counts
# processes by user, and a program's must not be its neighbor's.
_FIRST_USER, _USERS = 61184, 4335
FAILED, NO_SANDBOX, BUSY = 1, 97, 98
# What passes by itself: others use the machine up.
_PASSING = {errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EUSERS}
_LONGEST_REPLY = 16 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def enter_namespaces() -> None:
    """No network, no other processes to see or signal, and no rights over what is outside."""
    flags = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", _libc.unshare(flags))
        return
    _call("unshare", _libc.unshare(flags | _CLONE_NEWUSER))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount_folder(folder: str, size: int, files: int) -> None:
    """Make every mount read-only, then put an empty one of limited size over `folder`.

    And one that holds nothing over /proc, through which a pipe could be opened from its other side.
    """
    attributes = ctypes.create_string_buffer(struct.pack("4Q", _MOUNT_READ_ONLY, 0, _MS_PRIVATE, 0))
    _call(
        "mount_setattr",
        _libc.syscall(_MOUNT_SETATTR, _AT_CWD, b"/", _AT_RECURSIVE, attributes, 32),
    )
    for path, options in (
        ("/proc", "size=4k,nr_inodes=1,mode=555"),
        (folder, f"size={size},nr_inodes={files + 1},mode=777"),
    ):
        given = (b"tmpfs", os.fsencode(path), b"tmpfs", _MS_NOSUID | _MS_NODEV, options.encode())
        _call("mount", _libc.mount(*given))


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
    for path, allowed in [*rules, (os.devnull, _READ | _WRITE), (folder, handled)]:
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


def give_up_root(user: int) -> None:
    """Become a user that owns nothing: root's limit on processes does not hold.

    An ordinary user keeps its id and gives up the rights that its new namespace gave it. Root keeps
    the right to pass through folders, also for programs that are started, as Python may lie in a
    private one; what can be read there, Landlock says.
    """
    kept = 0
    if os.geteuid() == 0:
        _call("prctl", _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        kept = 1 << _CAP_DAC_READ_SEARCH
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", kept, kept, kept, 0, 0, 0))
    _call("capset", _libc.capset(header, data))
    if kept:
        raised = (_PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH, 0, 0)
        _call("prctl", _libc.prctl(_PR_CAP_AMBIENT, *raised))


def install_filter(program: bytes) -> None:
    """Let the kernel look at every system call from here on; see `sandbox`."""
    steps = ctypes.create_string_buffer(program, len(program))
    length = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(steps))
    _call("seccomp", _libc.prctl(_PR_SET_SECCOMP, 2, ctypes.create_string_buffer(length), 0, 0))


def pack(value: Any) -> Any:
    """Plain data as JSON; numbers, texts and containers of their own kinds become plain ones."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):  # in hex where decimal digits could be too many for Python
        return int(value) if abs(value) < 1 << 63 else {"int": [hex(value)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [pack((key, each)) for key, each in value.items()]}
    for kind in (list, tuple, set, frozenset, bytes):
        if isinstance(value, kind):
            return {kind.__name__: [pack(each) for each in value]}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a number of NumPy
        return pack(value.item())
    raise TypeError(f"{type(value).__name__} is no plain data (numbers, texts, containers of them)")


def unpack(value: Any) -> Any:
    """The data of `pack`, of Python's own types whatever was sent."""
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a list that `pack` did not make")
        return value
    ((kind, parts),) = value.items()
    unpacked = [unpack(part) for part in parts]
    if kind == "int":
        return int(unpacked[0], 16)
    if kind == "complex":
        return complex(*unpacked)
    known = {each.__name__: each for each in (dict, list, tuple, set, frozenset, bytes)}
    return known[kind](unpacked)


def attempt(action: Callable[[], Any]) -> bytes:
    """A line with what an action returned, or with what it raised."""
    try:
        return json.dumps({"value": pack(action())}).encode() + b"\n"
    except BaseException as error:
        kind = type(error).__name__
        try:
            text = str(error)
        except BaseException:  # the program's own kind of error may raise anything
            text = ""
        return json.dumps({"error": [kind, text[:300]]}).encode() + b"\n"


def serve(source: bytes, requests: int, replies: int) -> None:
    """Run the program, then call its functions as the judge asks; one line for each."""
    names: dict[str, Any] = {"__name__": "__main__"}
    process = os.getpid()

    def call(name: str, arguments: Any, named: Any) -> Any:
        if name not in names:
            raise NameError(f"name {name!r} is not defined")
        return names[name](*unpack(arguments), **unpack(named))

    def answer(action: Callable[[], Any]) -> None:
        line = attempt(action)
        if os.getpid() != process:  # a copy that the program made of itself
            os._exit(0)
        while line:
            line = line[os.write(replies, line) :]

    answer(lambda: exec(compile(source, "<program>", "exec"), names))
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            answer(functools.partial(call, *json.loads(line)))


def receive(replies: BinaryIO) -> Any:
    """What the program answered; raises what it raised."""
    line = replies.readline(_LONGEST_REPLY)
    if not line.endswith(b"\n"):
        raise RuntimeError("the program ended, or answered too much, before it came to its end")
    answer = json.loads(line)
    if "error" not in answer:
        return unpack(answer["value"])
    kind, text = map(str, answer["error"])
    known = getattr(builtins, kind, None)
    error: Exception = RuntimeError(f"{kind}: {text}")
    # Not StopIteration, which would end a loop of the tests.
    if isinstance(known, type) and issubclass(known, Exception) and known is not StopIteration:
        with contextlib.suppress(TypeError):  # some take no text
            error = known(text)
    raise error


def judge(tests: dict[str, str], requests: BinaryIO, replies: BinaryIO) -> None:
    """Wait for the program's end and run the tests; raises where one fails."""
    receive(replies)

    def function(*arguments: Any, **named: Any) -> Any:
        call = [tests["function"], pack(arguments), pack(named)]
        requests.write(json.dumps(call).encode() + b"\n")
        requests.flush()
        return receive(replies)

    names: dict[str, Any] = {"__name__": "__main__"}
    # The start of a function may or may not be one by itself.
    for given in (tests["given"], tests["given"] + "\n    pass", ""):
        try:
            code = compile(given, "<given>", "exec")
        except SyntaxError:
            continue
        exec(code, names)
        break
    names[tests["function"]] = function
    exec(compile(tests["test"], "<test>", "exec"), names)


def report(pipe: int, kind: bytes, text: str = "") -> None:
    """Tell the launcher: S limits are set, X they cannot be, B not now, P passed, E failed."""
    os.write(pipe, kind + text.encode(errors="replace")[:300])


def read_exactly(descriptor: int, length: int) -> bytes:
    """So many bytes and none behind them."""
    found = b""
    while len(found) < length:
        part = os.read(descriptor, length - len(found))
        if not part:
            raise OSError(0, "the program did not arrive whole")
        found += part
    return found


def start(stdin: int, pipe: int) -> tuple[BinaryIO, BinaryIO]:
    """Fork the program, before the tests are read; returns the pipes to and from it."""
    (length,) = struct.unpack("Q", read_exactly(stdin, 8))
    source = read_exactly(stdin, length)
    requests, to_program = os.pipe()
    from_program, replies = os.pipe()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which does not reach the first process
    if os.fork() == 0:
        try:
            for descriptor in range(3, 256):
                if descriptor not in (requests, replies):
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            del sys.argv[1:]
            serve(source, requests, replies)
        finally:
            os._exit(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans leave nothing to be waited for
    os.close(requests)
    os.close(replies)
    report(pipe, b"S")
    return os.fdopen(to_program, "wb"), os.fdopen(from_program, "rb")


def limited(pipe: int, user: int) -> tuple[int, BinaryIO, BinaryIO]:
    """Give up all rights and start the program; returns stdin and the pipes to and from it."""
    folder, numbers, filters = sys.argv[1], sys.argv[2:-1], bytes.fromhex(sys.argv[-1])
    seconds, memory, file_size, processes, size, files = map(float, numbers)
    mount_folder(folder, int(size), int(files))
    os.chdir(folder)
    stdin = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    give_up_root(user)
    # After the change of user, which clears it.
    _call("prctl", _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    _call("prctl", _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    confine(folder)
    limit(seconds, int(memory), int(file_size), int(processes))
    install_filter(filters)
    return stdin, *start(stdin, pipe)


def first_process(pipe: int, user: int) -> None:
    """Give up all rights, start the program, judge it, tell the launcher."""
    try:
        stdin, requests, replies = limited(pipe, user)
    except Exception as error:
        passing = isinstance(error, OSError) and error.errno in _PASSING
        report(pipe, b"B" if passing else b"X", str(error))
        os._exit(1)
    try:
        judge(json.load(os.fdopen(stdin, "rb")), requests, replies)
    except BaseException as error:
        report(pipe, b"E", f"{type(error).__name__}: {error}")
        os._exit(1)
    report(pipe, b"P")
    os._exit(0)


def wait(child: int, seconds: float) -> bool:
    """Whether a child ends in time; it is killed when the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def end(code: int, text: str = "") -> None:
    """Leave, with the reason on stderr."""
    print(text, file=sys.stderr, flush=True)
    os._exit(code)


def main() -> None:
    """Start the first process, wait for it, and end with what it told."""
    inlet, pipe = os.pipe()
    user = _FIRST_USER + os.getpid() % _USERS
    try:
        with contextlib.suppress(OSError):  # where memory is short, it is the program that ends
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")
        enter_namespaces()
        child = os.fork()
    except OSError as error:
        end(BUSY if error.errno in _PASSING else NO_SANDBOX, str(error))
    if child == 0:
        os.close(inlet)
        first_process(pipe, user)
    os.close(pipe)
    told = os.read(inlet, 4096)
    kind, text = told[:1], told[1:].decode(errors="replace")
    if kind == b"X":
        end(NO_SANDBOX, text)
    if kind != b"S":
        end(BUSY, text or "it was ended before its limits were set")
    if not wait(child, float(sys.argv[2])):
        end(FAILED, "timeout")
    while part := os.read(inlet, 4096):
        told += part
    if told == b"SP":
        end(0)
    end(FAILED, told[2:].decode(errors="replace"))


if __name__ == "__main__":
    main()
