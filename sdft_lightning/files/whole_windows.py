"""Nothing is saved, and no fit ends, inside an accumulation window: its gradients would be lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from sdft_lightning.errors import UserError


class WindowCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which waits for the end of an accumulation window.

    Lightning would also save after the first micro-batches of a window: by the clock
    (train_time_interval), and once more after a resume with every_n_train_steps.

    It also waits for the validation that follows a step, where the checkpoint is ranked by one of
    its metrics: Lightning would rank it by those of the validation before. And only for that one,
    where Lightning leaves out what is due at an epoch's end without a validation.
    """

    _step = 0
    # During `on_train_batch_end` only: whether a validation follows.
    _validated_next: bool | None = None

    @property
    def state_key(self) -> str:
        """ModelCheckpoint's own, so that the state is found in checkpoints of either class."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is due before the next optimizer step, also in a resumed run."""
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Save, if it is due, where the optimizer has just stepped."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._validated_next = _is_validated_next(trainer)
            super().on_train_batch_end(trainer, *args, **kwargs)
            self._validated_next = None

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: Any, current: str) -> bool:
        # The older file's name may come from the checkpoint that was resumed from. Lightning takes
        # `checkpoints/../…` for a file in checkpoints, and removes what is on another host unseen.
        own = is_below(previous, self.dirpath)
        return own and super()._should_remove_checkpoint(trainer, previous, current)

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        candidates: dict[str, Tensor] = super()._monitor_candidates(trainer)
        if self._validated_next and not str(self.monitor).startswith("train/"):
            candidates.pop(str(self.monitor), None)  # without it Lightning puts the checkpoint off
        return candidates

    def _should_save_on_train_epoch_end(self, trainer: L.Trainer) -> bool:
        # Asked on an epoch's last batch: whether not to wait for a validation.
        return self._validated_next is False or super()._should_save_on_train_epoch_end(trainer)


def is_below(path: str | Path, folder: str | Path | None) -> bool:
    """Whether a file is in a folder or below it, wherever `..` and links lead.

    Args:
        path: Local, or with a protocol (s3://…).
        folder: Likewise; None takes any file.
    """
    if folder is None:
        return True
    if "://" in str(path) or "://" in str(folder):
        inside = str(path).startswith(str(folder).rstrip("/") + "/")
        return inside and ".." not in str(path).split("/")
    return Path(folder).resolve() in Path(path).resolve().parents


def _is_validated_next(trainer: Any) -> bool:
    """Whether a validation follows the batch that just ended."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


class WholeWindows(L.Callback):
    """Refuses options that would save inside a window, and lets no fit end there.

    Lightning's own `max_time` stops at any micro-batch; here a stop waits for the optimizer's step.
    """

    def __init__(self) -> None:
        self._step = 0
        self._stop = False

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Check with what Lightning has counted; what was resumed from is saved already."""
        if math.isfinite(trainer.num_training_batches):
            check_whole_windows(trainer, trainer.num_training_batches)
        self._step = trainer.global_step
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback._last_global_step_saved = trainer.global_step

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Put a stop off until the window's end."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            trainer.should_stop, self._stop = trainer.should_stop or self._stop, False
        elif trainer.should_stop:
            trainer.should_stop, self._stop = False, True


def limited_batches(trainer: Any, batches: int) -> int:
    """Training micro-batches of an epoch, after `trainer.limit_train_batches`.

    Args:
        trainer: Of a fit.
        batches: What the loader has.
    """
    if isinstance(trainer.limit_train_batches, int):
        return min(batches, trainer.limit_train_batches)
    return int(batches * trainer.limit_train_batches)


def check_whole_windows(trainer: Any, batches: int) -> None:
    """Refuse what would write a checkpoint inside an accumulation window.

    Args:
        trainer: Of a fit.
        batches: Training micro-batches of an epoch.

    Raises:
        UserError: If validations or checkpoints would fall there.
    """
    window, batches = trainer.accumulate_grad_batches, limited_batches(trainer, batches)
    if window == 1 or batches < 1:
        return
    _check_checkpoints(trainer, window)
    if trainer.limit_val_batches == 0:
        return
    lost = f"trainer.accumulate_grad_batches is {window}, and its gradients are in no checkpoint"
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        raise UserError(
            "trainer.val_check_interval: got a duration, which ends anywhere in a window: "
            f"{lost}. Give a number of micro-batches that is a multiple of {window}."
        )
    interval = _interval(trainer, batches)
    for place in _validated_at(trainer, batches, interval):
        if place % window and place != batches:
            raise UserError(
                f"trainer.val_check_interval: got {trainer.val_check_interval}, so a validation "
                f"and its checkpoint follow micro-batch {place} of {batches} of an epoch, inside "
                f"a window: {lost}. {_remedy(trainer, interval, window, batches)}"
            )


def validates_in_fit(trainer: Any, batches: int | None) -> bool:
    """Whether a validation falls into a fit.

    Args:
        trainer: Of a fit.
        batches: Training micro-batches of an epoch that the loader has; None where nobody knows.
    """
    if trainer.limit_val_batches == 0:
        return False
    by_the_clock = getattr(trainer, "_val_check_time_interval", None) is not None
    batches = None if batches is None else limited_batches(trainer, batches)
    if not batches or by_the_clock:
        return True
    every = trainer.check_val_every_n_epoch
    first = (0 if every is None else (every - 1) * batches) + _interval(trainer, batches)
    ends = trainer.max_steps > 0 or trainer.max_epochs not in (None, -1)
    return not ends or first <= _all_batches(trainer, batches)


def _check_checkpoints(trainer: Any, window: int) -> None:
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.save_on_exception:
            raise UserError(
                "checkpoint.save_on_exception: got true, allowed is false where "
                f"trainer.accumulate_grad_batches is {window}: the gradients of the window under "
                "way are in no checkpoint. Set checkpoint.every_n_train_steps instead."
            )
        by_the_clock = callback._train_time_interval is not None
        if by_the_clock and not isinstance(callback, WindowCheckpoint):
            raise UserError(
                "ModelCheckpoint: train_time_interval saves anywhere in a window, and "
                f"trainer.accumulate_grad_batches is {window}. Use "
                "sdft_lightning.callbacks.WindowCheckpoint, which takes the same options."
            )


def _interval(trainer: Any, batches: int) -> int:
    """Micro-batches between two validations."""
    given = trainer.val_check_interval
    return max(1, int(batches * given)) if isinstance(given, float) else int(given)


def _validated_at(trainer: Any, batches: int, interval: int) -> Iterator[int]:
    """Places of the validations in an epoch, from 1."""
    if trainer.check_val_every_n_epoch is not None:
        yield from range(interval, batches + 1, interval)
        return
    # Counted on over epochs, of which each begins with a new window.
    total = min(_all_batches(trainer, batches), math.lcm(interval, batches))
    for count in range(interval, total + 1, interval):
        yield (count - 1) % batches + 1


def _all_batches(trainer: Any, batches: int) -> int:
    """Micro-batches of the whole fit; those of many epochs where it has no end."""
    window = trainer.accumulate_grad_batches
    limits = [batches**3]
    if trainer.max_steps > 0:
        epochs, steps = divmod(trainer.max_steps, -(-batches // window))
        limits.append(epochs * batches + steps * window)
    if trainer.max_epochs not in (None, -1):
        limits.append(trainer.max_epochs * batches)
    return min(limits)


def _remedy(trainer: Any, interval: int, window: int, batches: int) -> str:
    in_epoch = trainer.check_val_every_n_epoch is not None
    if interval % window == 0:
        return (
            f"An epoch of {batches} ends with a shorter window, and with "
            "trainer.check_val_every_n_epoch null micro-batches are counted on over epochs. Set it "
            "to 1."
        )
    below = interval // window * window
    near = [each for each in (below, below + window) if 0 < each <= (batches if in_epoch else each)]
    choices = [str(each) for each in near] + (["1.0 (the end of an epoch)"] if in_epoch else [])
    return f"Allowed are multiples of {window}. Set it to {' or '.join(choices)}."
