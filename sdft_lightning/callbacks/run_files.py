"""Where callbacks write: below the run's own folder, on rank zero, never over older files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of the run; the command line sets it to runs/<name>."""
    return Path(trainer.default_root_dir)


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a JSON Lines file, made if absent.

    Where a killed process left a line without its end, the new ones begin on a line of their own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and _last_byte(file) != b"\n":
            file.write(b"\n")
        for record in records:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def unused_path(path: Path) -> Path:
    """`path`, or with -1, -2, … before its suffix if there is such a file or folder already."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def tensorboard(trainer: L.Trainer) -> Any | None:
    """The TensorBoard writer of the run, if it has one."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.experiment
    return None
