"""Where callbacks write: below the run's own folder, on rank zero, never over older files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from sdft_lightning.files.json_text import json_text
from sdft_lightning.files.whole_files import append_whole


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of the run; the command line sets it to runs/<name>."""
    return Path(trainer.default_root_dir)


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a JSON Lines file, made if absent; no line is ever half there.

    What is no number (NaN, an infinity) is written as null.
    """
    append_whole(path, "".join(json_text(each) + "\n" for each in records))


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
