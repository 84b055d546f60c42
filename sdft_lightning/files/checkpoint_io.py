"""How checkpoints are written, whole or not at all and of numbers only, and how they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from sdft_lightning.errors import UserError, printable
from sdft_lightning.files.whole_files import whole_file
from sdft_lightning.models.sharding import local

# The parts of a checkpoint, and what each is; the first five are in all of them.
_PARTS: dict[str, type] = {
    "state_dict": dict,
    "global_step": int,
    "epoch": int,
    "loops": dict,
    "pytorch-lightning_version": str,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
_OF_A_CHECKPOINT = set(list(_PARTS)[:5])


def write_whole_checkpoints(trainer: Any) -> None:
    """Let a trainer write its checkpoints with `WholeCheckpointIO`, unless it was given another."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, waits for the disk, then renames it into its place.

    Lightning's own builds the file in memory first and does not wait for the disk; this one needs
    no memory for it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What `torch.save` takes.
            path: A local file; an older one stays until the new one is complete. Anything else
                (s3://…) is left to Lightning.
            storage_options: None; others are refused by Lightning.

        Raises:
            UserError: If it cannot be written.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint as Lightning does.

        Args:
            path: A file, or an address that Lightning reads.
            args: For Lightning.
            kwargs: For Lightning.

        Raises:
            UserError: If a local file cannot be read, or is no checkpoint of a run.
        """
        try:
            content: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        except Exception:
            if "://" not in str(path):
                load_checkpoint(path)  # says what is wrong with the file, if anything is
            raise
        _check_parts(content, path)
        return content


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, and lazily.

    Args:
        path: An existing file.

    Returns:
        Its content, on the CPU.

    Raises:
        UserError: If it cannot be read as a checkpoint.
    """
    if Path(path).is_dir():
        raise UserError(
            f"ckpt_path: {path} is a folder, and checkpoints are files. Name one of the run's "
            "checkpoints/ folder."
        )
    if not Path(path).is_file():  # a pipe would be waited for, a device never ends
        raise UserError(
            f"ckpt_path: {path} is no file but a pipe or a device. Name a file of the run's "
            "checkpoints/ folder."
        )
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = dict(content)
    except Exception as error:  # whatever a file that is none makes torch do
        raise UserError(
            f"ckpt_path: {path} cannot be read as a checkpoint ({type(error).__name__}); it may "
            "have been cut short. Name an older one of the run's checkpoints/ folder."
        ) from error
    return found


def load_whole_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, as `load_checkpoint`, that has all parts that Lightning needs.

    Raises:
        UserError: Also if a part is missing, or is not what Lightning writes there.
    """
    content = load_checkpoint(path)
    _check_parts(content, path)
    return content


def _check_parts(content: Mapping[str, Any], path: str | Path) -> None:
    missing = _OF_A_CHECKPOINT - content.keys()
    if missing:
        raise UserError(
            f"ckpt_path: {path} is no checkpoint of a run: it has no {', '.join(sorted(missing))}. "
            "Name one of the run's checkpoints/ folder."
        )
    for name, kind in _PARTS.items():
        found = content.get(name, kind())
        if not isinstance(found, kind) or (isinstance(found, int) and not 0 <= found < 2**63):
            raise UserError(
                f"ckpt_path: {path} is no checkpoint of a run: its {name} is "
                f"{printable(repr(found), 80)}. Name one of the run's checkpoints/ folder."
            )
    odd = [name for name, each in content["state_dict"].items() if not isinstance(each, Tensor)]
    if odd:
        raise UserError(
            f"ckpt_path: {path} is no checkpoint of a run: its state_dict has what is no tensor, "
            f"{printable(repr(odd[0]), 80)}. Name one of the run's checkpoints/ folder."
        )


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
