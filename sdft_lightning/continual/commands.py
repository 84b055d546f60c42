"""How a run's command is carried out: in this process, or in one of its own."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

Command = Callable[[list[str]], None]
_LAST_LINES = 20
_INTERRUPTED_ITSELF = 5.0  # seconds until a process is told that may have had a Ctrl-C itself
# Of a process that a person or a scheduler ended.
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STOPPED = (*(-each for each in _ENDING), *(128 + each for each in _ENDING))


class RunFailed(Exception):
    """A command has failed; the text says why."""


class Stopped(Exception):
    """Someone has asked this process, or the one of a command, to end.

    Args:
        code: What to exit with: 128 plus the signal's number.
    """

    def __init__(self, code: int = 128 + signal.SIGTERM) -> None:
        super().__init__(code)
        self.code = code


def in_this_process(main: Callable[[], None]) -> Command:
    """Carry commands out here.

    Args:
        main: The command line's entry; reads sys.argv, as everything below it may.
    """

    def run(args: list[str]) -> None:
        try:
            with _as_command_line(args):
                main()
        except (Exception, SystemExit) as error:
            if _is_stop(error):
                raise Stopped(_stop_code(error)) from error
            if not isinstance(error, SystemExit) or error.code not in (None, 0):
                raise RunFailed(_reason(error)) from error
        finally:
            gc.collect()  # the modules of a run hold each other, and their tensors

    return run


@contextmanager
def _as_command_line(args: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [before[0], *args]
    try:
        yield
    finally:
        sys.argv = before


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_stop(error: BaseException) -> bool:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    # Lightning turns Ctrl-C into an exit with code 1.
    return any(isinstance(each, KeyboardInterrupt | SIGTERMException) for each in _chain(error))


def _stop_code(error: BaseException) -> int:
    if any(isinstance(each, KeyboardInterrupt) for each in _chain(error)):
        return 128 + signal.SIGINT
    code = getattr(error, "code", None)
    return code if code in _STOPPED else 128 + signal.SIGTERM


def _reason(error: BaseException) -> str:
    """The first cause that says something: an exit code does not."""
    for each in _chain(error):
        if not isinstance(each, SystemExit):
            return f"{type(each).__name__}: {each}"
    return f"exit code {error.code}" if isinstance(error, SystemExit) else str(error)


def in_own_process(locks: tuple[int, ...] = ()) -> Command:
    """Carry each command out in a process of its own.

    Args:
        locks: Files that the process keeps open: should this one be killed, the locks stay until
            the other has ended, and nobody starts a second run in its folder.
    """

    def run(args: list[str]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdft_lightning.cli", *args],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=locks,
        )
        assert process.stderr is not None
        with _told_to_stop(process) as told:
            last = _show(process.stderr)
            code = process.wait()
        if code in _STOPPED or told:
            raise Stopped(128 + told[0] if told else code if code > 0 else 128 - code)
        if code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise RunFailed("\n".join([f"{how}; the last lines of its messages:", *last]))

    return run


@contextmanager
def _told_to_stop(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Pass SIGTERM, Ctrl-C and a hang-up on to a command's process, and wait until it has ended.

    Yields:
        The signals that came.
    """
    told: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        if number == signal.SIGHUP and number in told:
            return  # it comes from the terminal and from its shell: the run's end is under way
        told.append(number)
        # A terminal sends Ctrl-C and its hang-up to both. Where it came to this process alone, the
        # other is told.
        delay = 0.0 if number == signal.SIGTERM else _INTERRUPTED_ITSELF
        timer = threading.Timer(delay, process.terminate)  # nothing, where it has ended
        timer.daemon = True
        timer.start()

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes none
        for number in _ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it, for both
                before[number] = signal.signal(number, pass_on)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(stream: IO[str]) -> list[str]:
    """Pass messages on as they come, and keep the last ones."""
    last: deque[str] = deque(maxlen=_LAST_LINES)
    for line in stream:
        sys.stderr.write(line)
        last.append(line.rstrip("\n"))
    return list(last)
