"""Lets a run end well when it is told to: SIGTERM, Ctrl-C, a hang-up, SLURM's time limit."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdft_lightning.files.run_folder import run_folder

# `timeout`, some schedulers and a plan send a signal to the process and to its group: one request.
_ONE_REQUEST = 1.0  # seconds
_opened: set[int] = set()  # the pipes of this process


class SecondSignal:
    """Watches for a second SIGTERM, say, also while the main thread is in a hung collective.

    A handler in Python runs between two instructions of the main thread only. So the system's own
    handler writes each signal into a pipe, and a thread reads it. To be made in the main thread.

    Args:
        numbers: Signals of which a second one ends the process; they need a handler in Python.
        before: Called before it ends.
    """

    def __init__(self, numbers: Collection[int], before: Callable[[], None]) -> None:
        self._numbers = numbers
        self._before = before
        self._first: dict[int, float] = {}
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._former = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        _opened.add(self._writing)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()

    def close(self) -> None:
        """End the watch."""
        if self._writing in _opened:
            signal.set_wakeup_fd(self._former, warn_on_full_buffer=False)
            _opened.discard(self._writing)
            os.close(self._writing)

    def _watch(self, reading: int) -> None:
        while came := os.read(reading, 64):
            for number in came:
                if number in self._numbers:
                    self._take(number)
        os.close(reading)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if now - self._first.setdefault(number, now) <= _ONE_REQUEST:
            return
        with contextlib.suppress(Exception):  # nothing may keep the process from its end
            name = signal.Signals(number).name
            print(f"{name} came again: ended at once, without saving.", file=sys.stderr, flush=True)
            self._before()
        os._exit(128 + number)


def _forget() -> None:
    """Let no forked process, such as a loader's, write its signals into this one's pipe."""
    if _opened:
        with contextlib.suppress(ValueError):  # not its main thread
            signal.set_wakeup_fd(-1)
        for number in _opened:
            os.close(number)
        _opened.clear()


os.register_at_fork(after_in_child=_forget)


log = logging.getLogger(__name__)

# They end the run; of those in the second line a second one does so at once. A hang-up comes more
# than once by itself: from the terminal, and from the shell in it.
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_IMPATIENT = (signal.SIGTERM, signal.SIGINT)


class SaveOnSignal(L.Callback):
    """Acts on signals between two optimizer steps only, and saves checkpoints/last.ckpt.

    SIGTERM, SIGHUP and SIGINT (Ctrl-C) save and end the run, with 128 plus the signal's number as
    exit code; a second SIGTERM or SIGINT ends it at once. What is ignored when training starts, as
    `nohup` has it, stays ignored. Outside of training SIGHUP and SIGINT do what they did before.

    Lightning would act inside an accumulation window, and its SLURM handler even between the
    optimizer's step and the teacher's. Here a signal waits for the end of the step under way (on
    one process also of the validation batch), so that the run goes on exactly from what is saved.
    Under SLURM, SIGUSR1 saves and requeues the job, as Lightning does it.
    """

    def __init__(self) -> None:
        self._waiting: set[int] = set()
        self._handlers: dict[int, Any] = {}
        self._former: dict[int, Any] = {}
        self._second: SecondSignal | None = None
        self._ended_by = signal.SIGTERM
        self._ended_step = 0
        self._begun_step = 0

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Put a note-taker in front of Lightning's handlers, which are in place by now."""
        self._ended_step = self._begun_step = trainer.global_step
        self._ended_by = signal.SIGTERM
        _adopt_last(trainer)
        if threading.current_thread() is not threading.main_thread():
            return
        self._release()
        wanted: list[int] = [signal.SIGTERM]
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            wanted += [environment.requeue_signal] if environment.requeue_signal else []
        for number in wanted:
            handler = signal.getsignal(number)
            if callable(handler):
                self._take(number, handler)
        for number in (signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._take(number, signal.getsignal(signal.SIGTERM))
        ends = [number for number in _IMPATIENT if number in self._handlers]
        self._second = SecondSignal(ends, lambda: _end_other_processes(trainer))

    def _take(self, number: int, handler: Any) -> None:
        self._handlers[number] = handler
        self._former[number] = signal.signal(number, self._note)

    def _release(self) -> None:
        """Put the former handlers back, where nobody has put others in place since."""
        if self._second is not None:
            for number, handler in self._former.items():
                if signal.getsignal(number) == self._note:
                    signal.signal(number, handler)
            self._second.close()
        self._second = None
        self._former, self._handlers = {}, {}
        self._waiting.clear()

    def teardown(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        """Training is over."""
        self._release()

    def _note(self, number: int, frame: Any) -> None:
        self._waiting.add(number)
        again = " A second one ends the run at once, unsaved." if number in _IMPATIENT else ""
        name = signal.Signals(number).name
        log.info(f"{name} came: it takes effect at the end of this step.{again}")

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """SIGTERM and the like: Lightning ends the run once all callbacks have seen this step."""
        if trainer.global_step != self._ended_step:
            self._ended_step = trainer.global_step
            self._end(trainer)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Other signals: their handler saves, so the teacher must have moved after the step."""
        if trainer.global_step != self._begun_step:
            self._begun_step = trainer.global_step
            self._act(trainer, [each for each in self._handlers if each not in _ENDING])

    def on_validation_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """The end does not wait for that of a long validation."""
        if trainer.world_size == 1:  # ranks may have unlike numbers of batches
            self._end(trainer)

    def _act(self, trainer: Any, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._handlers and _came(trainer, number in self._waiting):
                self._waiting.discard(number)
                self._handlers[number](number, None)

    def _end(self, trainer: Any) -> None:
        if self._handlers and _came(trainer, not self._waiting.isdisjoint(_ENDING)):
            came = [each for each in _ENDING if _came(trainer, each in self._waiting)]
            self._ended_by = came[0]
            # Lightning's handler, told that SIGTERM is no news: it would send one to the other
            # processes, for which it might be the second. They are here as well.
            trainer._signal_connector.received_sigterm = True
            self._handlers[signal.SIGTERM](signal.SIGTERM, None)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Save, where Lightning ends the run because of a signal, which the exit code names."""
        try:
            if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit":
                exception.code = 128 + self._ended_by
                self._save(trainer)
        finally:
            self._release()

    def _save(self, trainer: Any) -> None:
        step, name = trainer.global_step, self._ended_by.name
        if step == 0:
            log.warning(f"Stopped by {name} before the first step; there is nothing to save.")
            return
        path = run_folder(trainer) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        log.warning(
            f"Stopped by {name} after step {step}; saved {path}. Go on with --ckpt_path=last."
        )


def _came(trainer: Any, here: bool) -> bool:
    """Whether a signal has come on any rank: all act at the same step."""
    return bool(trainer.strategy.reduce_boolean_decision(here, all=False))


def _end_other_processes(trainer: Any) -> None:
    """Kill the processes that this one has started for other devices."""
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGKILL)


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
