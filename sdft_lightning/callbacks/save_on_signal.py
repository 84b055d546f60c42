"""Lets a run end well when it is told to: SIGTERM, and SLURM's signal before a time limit."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdft_lightning.callbacks.run_files import run_folder

log = logging.getLogger(__name__)


class SaveOnSignal(L.Callback):
    """Acts on signals between two optimizer steps only, and saves checkpoints/last.ckpt on SIGTERM.

    Lightning would act inside an accumulation window, and its SLURM handler even between the
    optimizer's step and the teacher's. Here a signal waits for the end of the step under way (on
    one process also of the validation batch), so that the run goes on exactly from what is saved.
    Under SLURM, SIGUSR1 saves and requeues the job, as Lightning does it.
    """

    def __init__(self) -> None:
        self._waiting: set[int] = set()
        self._handlers: dict[int, Any] = {}
        self._ended_step = 0
        self._begun_step = 0

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Put a note-taker in front of Lightning's handlers, which are in place by now."""
        self._ended_step = self._begun_step = trainer.global_step
        _adopt_last(trainer)
        if threading.current_thread() is not threading.main_thread():
            return
        wanted: list[int] = [signal.SIGTERM]
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            wanted += [environment.requeue_signal] if environment.requeue_signal else []
        for number in wanted:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._waiting.add(number)
        log.info(f"{signal.Signals(number).name} came: it takes effect at the end of this step.")

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """SIGTERM: Lightning ends the run once all callbacks have seen the end of this step."""
        if trainer.global_step != self._ended_step:
            self._ended_step = trainer.global_step
            self._act(trainer, [signal.SIGTERM])

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Other signals: their handler saves, so the teacher must have moved after the step."""
        if trainer.global_step != self._begun_step:
            self._begun_step = trainer.global_step
            self._act(trainer, [each for each in self._handlers if each != signal.SIGTERM])

    def on_validation_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """SIGTERM does not wait for the end of a long validation."""
        if trainer.world_size == 1:  # ranks may have unlike numbers of batches
            self._act(trainer, [signal.SIGTERM])

    def _act(self, trainer: Any, numbers: list[int]) -> None:
        for number in numbers:
            if number not in self._handlers:
                continue
            # All ranks act at the same step, also where the signal reached one of them only.
            if trainer.strategy.reduce_boolean_decision(number in self._waiting, all=False):
                self._waiting.discard(number)
                self._handlers[number](number, None)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Save, where Lightning ends the run because of SIGTERM."""
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != "fit":
            return
        step = trainer.global_step
        if step == 0:
            log.warning("Stopped by SIGTERM before the first step; there is nothing to save.")
            return
        path = run_folder(trainer) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        log.warning(
            f"Stopped by SIGTERM after step {step}; saved {path}. Go on with --ckpt_path=last."
        )


def _adopt_last(trainer: Any) -> None:
    """Let a run replace the last.ckpt that it finds in its own folder.

    ModelCheckpoint writes last-v1.ckpt beside a last.ckpt that it does not know, such as one that
    was written on SIGTERM, or before the folder was named by another path.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.last_model_path:
            continue
        name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
        last = Path(callback.dirpath or "") / name
        if callback.save_last and last.exists():
            callback.last_model_path = str(last)
