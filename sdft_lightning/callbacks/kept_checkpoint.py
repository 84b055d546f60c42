"""A second name for the best checkpoint, so that clearing up and overwriting do not lose it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint


def best_checkpoint(trainer: Any) -> Path | None:
    """The checkpoint with the best monitored metric; without one, the newest; None before any.

    One whose weights are not all finite is passed over.

    Args:
        trainer: Of a fit.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            for path in (callback.best_model_path, callback.last_model_path):
                if path and Path(path).is_file() and has_finite_weights(Path(path)):
                    return Path(path)
    return None


def has_finite_weights(path: Path) -> bool:
    """Whether all weights in a checkpoint are finite; they are read one after the other.

    Args:
        path: A checkpoint in one file.
    """
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    weights = checkpoint["state_dict"].values()
    return all(bool(torch.isfinite(w).all()) for w in weights if w.is_floating_point())


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
