"""A second name for the best checkpoint, so that clearing up and overwriting do not lose it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


def best_checkpoint(trainer: Any) -> Path | None:
    """The checkpoint with the best monitored metric; without one, the newest; None before any.

    Args:
        trainer: Of a fit.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            for path in (callback.best_model_path, callback.last_model_path):
                if path and Path(path).is_file():
                    return Path(path)
    return None


def keep_checkpoint(path: Path) -> Path:
    """Give a checkpoint a second name beside its own: a hard link, or a copy where none can be.

    Args:
        path: An existing file.

    Returns:
        `kept-<name>` in the same folder.
    """
    kept = path.with_name(f"kept-{path.name}")
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:
        shutil.copyfile(path, kept)
    return kept
