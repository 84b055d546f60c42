"""Weights that are no numbers are not written: neither into a checkpoint nor into an export."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from sdft_lightning.errors import UserError
from sdft_lightning.models.sharding import local


@torch.no_grad()
def non_finite(named: Iterable[tuple[str, Any]]) -> list[str]:
    """Which of some tensors hold a NaN or an infinity, without a copy of any.

    Args:
        named: Names and tensors; of one that is spread over processes, this one's part is read.
            Other values and whole numbers pass.

    Returns:
        Their names.
    """
    names, largest = [], []
    for name, value in named:
        part = local(value.detach()) if isinstance(value, Tensor) else None
        if part is not None and part.is_floating_point() and part.numel():
            names.append(name)
            # A NaN is the largest value of its tensor.
            largest.append(torch.linalg.vector_norm(part, ord=math.inf))
    # Asked at the end, so that a device works through all of them first.
    return [
        name for name, value in zip(names, largest, strict=True) if not math.isfinite(float(value))
    ]


def check_finite_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    """Refuse to write a checkpoint whose weights, or averages of the optimizer, are no numbers.

    Args:
        module: A `PolicyModule`; its student and what stands beside it are looked at. All
            processes come to the same decision.
        checkpoint: What is about to be written.

    Raises:
        UserError: Names a weight, the last good checkpoint and the remedy.
    """
    found = non_finite([*module.named_parameters(), *_optimizer_tensors(checkpoint)])
    trainer = module._trainer
    if trainer is None:
        bad = bool(found)
    else:
        bad = trainer.strategy.reduce_boolean_decision(bool(found), all=False)
    if not bad:
        return
    what = f"{found[0]} holds" if found else "weights on another process hold"
    good = last_good_checkpoint(trainer)
    raise UserError(
        f"step {checkpoint.get('global_step', 0)}: {what} NaN or infinity{_and_others(found)}, so "
        f"no checkpoint is written. The last good one is {good or 'none: there was none before'}. "
        "Lower the learning rate or set --trainer.gradient_clip_val=1.0"
        f"{'' if good is None else f', and go on with --ckpt_path={good}'}."
    )


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


def check_export(named: Iterable[tuple[str, Any]], folder: Path) -> None:
    """Refuse to export weights that are no numbers.

    Args:
        named: Names and weights.
        folder: Where they would be exported to.

    Raises:
        UserError: Names a weight.
    """
    found = non_finite(named)
    if found:
        raise UserError(
            f"{folder}: {found[0]} holds NaN or infinity{_and_others(found)}, so nothing is "
            "exported. Export an older checkpoint of the run, with --ckpt_path=…."
        )


def last_good_checkpoint(trainer: Any) -> Path | None:
    """The newest checkpoint of a run whose weights are finite; None if there is none.

    Args:
        trainer: Of a fit, or None.
    """
    callbacks = [] if trainer is None else trainer.checkpoint_callbacks
    folders = {
        Path(each.dirpath)
        for each in callbacks
        if isinstance(each, ModelCheckpoint) and each.dirpath and "://" not in str(each.dirpath)
    }
    if trainer is not None:
        folders.add(Path(trainer.default_root_dir) / "checkpoints")
    # Under its own name before a second one of the same file.
    files = {path for folder in folders for path in folder.rglob("*.ckpt") if path.is_file()}
    ordered = sorted(files, key=lambda p: (p.stat().st_mtime, not p.name.startswith("kept-")))
    return next((path for path in reversed(ordered) if _is_good(path)), None)


def _is_good(path: Path) -> bool:
    try:
        return has_finite_weights(path)
    except Exception:  # whatever a file that was cut short, or is none, makes torch do
        return False


def has_finite_weights(path: Path) -> bool:
    """Whether all weights in a checkpoint are finite; they are read one after the other.

    Args:
        path: A checkpoint in one file.
    """
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return not non_finite(checkpoint["state_dict"].items())


def _optimizer_tensors(checkpoint: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """What an optimizer keeps of each parameter; not in formats of its own, such as 8 bits."""
    for optimizer in checkpoint.get("optimizer_states", []):
        for number, state in optimizer.get("state", {}).items():
            if not isinstance(state, dict):
                continue
            for name, value in state.items():
                if type(value) in (Tensor, nn.Parameter):
                    yield f"the optimizer's {name} of parameter {number}", value
