"""Ends this process by SIGKILL at a named moment; used by the processes of test_kill."""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any


def die(*args: Any, **options: Any) -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def install(place: str, when: str, count: int) -> None:
    """Make a function deadly.

    Args:
        place: `module:name`, or `module:Class.name`.
        when: before or after it has done its work, or torn: half a line of a record is written.
        count: At which of its calls.
    """
    module_name, _, path = place.partition(":")
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    def deadly(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "torn":
            with args[0].open("a") as file:
                file.write('{"format": 1, "status": "fini')
            die()
        if calls == count and when == "before":
            die()
        result = original(*args, **options)
        if calls == count and when == "after":
            die()
        return result

    setattr(owner, name, deadly)
