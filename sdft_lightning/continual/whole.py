"""Files that are there as a whole or not at all, whatever interrupts their writer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sdft_lightning.errors import UserError
from sdft_lightning.files.json_text import json_text


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
