"""Ends the process at once when the same signal comes again, whatever the program hangs in."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection

# `timeout`, some schedulers and a plan send a signal to the process and to its group: one request.
_ONE_REQUEST = 1.0  # seconds
_opened: set[int] = set()  # the pipes of this process


class SecondSignal:
    """Watches for a second SIGTERM, say, also while the main thread is in a hung collective.

    A handler in Python runs between two instructions of the main thread only. So the system's own
    handler writes each signal into a pipe, and a thread reads it. To be made in the main thread.

    Args:
        numbers: Signals of which a second one ends the process; they need a handler in Python.
        before: Called before it ends.
    """

    def __init__(self, numbers: Collection[int], before: Callable[[], None]) -> None:
        self._numbers = numbers
        self._before = before
        self._first: dict[int, float] = {}
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._former = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        _opened.add(self._writing)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()

    def close(self) -> None:
        """End the watch."""
        if self._writing in _opened:
            signal.set_wakeup_fd(self._former, warn_on_full_buffer=False)
            _opened.discard(self._writing)
            os.close(self._writing)

    def _watch(self, reading: int) -> None:
        while came := os.read(reading, 64):
            for number in came:
                if number in self._numbers:
                    self._take(number)
        os.close(reading)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if now - self._first.setdefault(number, now) <= _ONE_REQUEST:
            return
        with contextlib.suppress(Exception):  # nothing may keep the process from its end
            name = signal.Signals(number).name
            print(f"{name} came again: ended at once, without saving.", file=sys.stderr, flush=True)
            self._before()
        os._exit(128 + number)


def _forget() -> None:
    """Let no forked process, such as a loader's, write its signals into this one's pipe."""
    if _opened:
        with contextlib.suppress(ValueError):  # not its main thread
            signal.set_wakeup_fd(-1)
        for number in _opened:
            os.close(number)
        _opened.clear()


os.register_at_fork(after_in_child=_forget)
