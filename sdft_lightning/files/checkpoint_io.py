"""How checkpoints are written, whole or not at all, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.errors.foreign_text import printable
from sdft_lightning.files.whole_files import whole_file

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
            f"ckpt_path: {path} is a folder, as DeepSpeed writes them; this command reads files. "
            "Export in the run itself, with the callback ExportModel."
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
