"""Files that are there as a whole or not at all, whatever interrupts their writer."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdft_lightning.errors import UserError
from sdft_lightning.json_text import json_text

_LOCK_ATTEMPTS = 20
_LOCK_PAUSE = 0.5  # seconds


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and move it there."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one line in one write, and wait until it is on the disk."""
    line = (json_text(record) + "\n").encode()
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def repair_records(path: Path) -> None:
    """Take away a last line that was cut short, so that the next one stands on its own."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if content.endswith(b"\n") or not content:
        return
    kept = content[: content.rfind(b"\n") + 1]
    with path.open("r+b") as file:
        file.truncate(len(kept))
        os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of records; a last one without its end is left out.

    Raises:
        UserError: If another line is no record.
    """
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: malformed: {error}. Remove the line; its run is then "
                "evaluated again."
            ) from error
        records.append(record)
    return records


@contextmanager
def held_lock(path: Path, what: str) -> Iterator[int]:
    """Hold a lock for as long as this process, and processes that inherit the file, are there.

    Args:
        path: The lock's file.
        what: What it protects, for the message.

    Yields:
        The file's number, for children to inherit.

    Raises:
        UserError: If another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _locked(number):
            raise UserError(
                f"name: another process works on {what} (it holds {path}). Wait for it or end it; "
                "to work beside it, give each process its own --shard."
            )
        yield number
    finally:
        os.close(number)


def _locked(number: int) -> bool:
    """Try for a while: workers of a killed process let go some seconds after it."""
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt < _LOCK_ATTEMPTS - 1:
                time.sleep(_LOCK_PAUSE)
        else:
            return True
    return False
