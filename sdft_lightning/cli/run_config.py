"""The config of a run in its folder, which stays free if the run cannot even start."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from sdft_lightning.callbacks.run_files import run_folder
from sdft_lightning.files.run_folder import LOCK, begun_elsewhere, is_requeued

_EVENTS = "events.out.tfevents"
# What Lightning and this callback write before anything is measured or trained.
_OF_THE_START = ("config.yaml", "hparams.yaml", _EVENTS)


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml once; a resumed run adds config-1.yaml and so on.

    A command that ends in an error before it has measured or trained anything takes back what it
    wrote, so that the mended command may have the same name.
    """

    begun = False  # whether anything was measured or trained
    _new_folder: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the whole config of this command.

        Raises:
            UserError: If another run of this name has begun since the folder was looked at.
        """
        folder = run_folder(trainer)
        if not trainer.is_global_zero or self.already_saved:
            return
        # The trainer knows its checkpoint only after the hooks of set-up.
        anew = stage == "fit" and not self.config.get("ckpt_path") and not is_requeued()
        if anew and (folder / "config.yaml").exists():
            raise begun_elsewhere(folder)
        self._new_folder = folder if _is_new(folder) else None
        folder.mkdir(parents=True, exist_ok=True)
        path, number = folder / "config.yaml", 0
        while path.exists():
            number += 1
            path = folder / f"config-{number}.yaml"
        self.parser.save(self.config, path, overwrite=False, multifile=self.multifile)
        self.already_saved = True

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Set-up is over."""
        self.begun = True

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Set-up is over."""
        self.begun = True

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Set-up is over."""
        self.begun = True

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Set-up is over."""
        self.begun = True

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """From here on there is something to keep."""
        self._new_folder = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave no folder behind that holds nothing but a start."""
        folder = self._new_folder
        if folder is None:
            return
        written = [path for path in folder.iterdir() if path.name != LOCK]
        if not all(_is_of_the_start(path) for path in written):
            return
        with contextlib.suppress(OSError):  # the error that ended the command is what counts
            for path in written:
                path.unlink()
            folder.rmdir()  # where no lock is held


def _is_new(folder: Path) -> bool:
    """Whether there is nothing but what this process's logger has opened."""
    return not folder.exists() or all(
        path.name.startswith((_EVENTS, LOCK)) for path in folder.iterdir()
    )


def _is_of_the_start(path: Path) -> bool:
    return path.name.startswith(_OF_THE_START) and path.is_file()
