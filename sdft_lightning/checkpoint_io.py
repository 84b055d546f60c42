"""How checkpoints are written: whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from sdft_lightning.whole_files import whole_file


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
