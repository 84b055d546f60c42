"""The last steps of a fit are in its last checkpoint."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(L.Callback):
    """Writes last.ckpt once more at the end of a fit that went on after it.

    With checkpoint.every_n_train_steps Lightning writes none at the end of an epoch, so up to n − 1
    steps would be missing from last.ckpt when the fit is over.
    """

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Save the end of the fit where a callback has saved an earlier step as last.ckpt."""
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or not callback.save_last:
                continue
            path = callback.last_model_path
            # Without any checkpoint so far Lightning writes one itself.
            if path and callback._last_global_step_saved not in (0, trainer.global_step):
                trainer.save_checkpoint(path, callback.save_weights_only)
                callback._last_global_step_saved = trainer.global_step
