"""A second name for the best checkpoint, so that clearing up and overwriting do not lose it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from sdft_lightning.files.finite_weights import has_finite_weights
from sdft_lightning.files.whole_windows import is_below


def best_checkpoint(trainer: Any) -> Path | None:
    """The checkpoint with the best monitored metric; without one, the newest; None before any.

    One whose weights are not all finite is passed over, and so is one of another run, which a
    resumed run may name.

    Args:
        trainer: Of a fit.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            for path in (callback.best_model_path, callback.last_model_path):
                own = bool(path) and is_below(path, callback.dirpath)
                if own and Path(path).is_file() and has_finite_weights(Path(path)):
                    return Path(path)
    return None


def kept_checkpoint(trainer: Any, name: str) -> Path | None:
    """The file of a name that `keep_checkpoint` gave in one of a run's checkpoint folders, or None.

    Args:
        trainer: Of a fit.
        name: From a checkpoint, so whatever somebody wrote there.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            for path in Path(callback.dirpath).rglob("kept-*"):
                if path.name == name and is_below(path, callback.dirpath):
                    return path
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
