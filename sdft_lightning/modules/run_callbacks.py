"""Callbacks that modules bring along: each run has them, from scripts as on the command line."""

from __future__ import annotations

import logging
import re
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft_lightning.errors import UserError
from sdft_lightning.files.run_folder import tensorboard
from sdft_lightning.files.whole_windows import WholeWindows
from sdft_lightning.modules.effective_update import EffectiveUpdate
from sdft_lightning.modules.monitors import training_names, validation_names
from sdft_lightning.modules.schedule import RunLength
from sdft_lightning.rollout.mismatch import Mismatch
from sdft_lightning.types import task_data

log = logging.getLogger(__name__)

METRIC = "train/sampler/log_prob_difference"
_FIRST_STEPS = 5
# Growth is counted from here at least: far below, differences are rounding and grow by chance.
_LEAST_START = 0.02
_CAUSES = (
    "Likely causes: the engine samples with old weights, or another run refreshes the same server; "
    "it serves another model or another dtype than the student's; its own sampling defaults are at "
    "work. The documentation's page on vLLM tells more"
)


class TeacherUpdate(L.Callback):
    """Calls `teacher.update_` after each optimizer step, whatever the accumulation.

    A callback rather than a hook of the module: checkpoints are written by callbacks, which run
    before the module's own hook of the same name.
    """

    def __init__(self) -> None:
        self.updated_at = 0

    def step_names(self, module: Any, trainer: Any) -> list[str]:
        """What is logged of a step."""
        return ["train/teacher_distance"] if trainer.log_every_n_steps else []

    def state_dict(self) -> dict[str, int]:
        """The optimizer step after which the teacher moved last."""
        return {"updated_at": self.updated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step."""
        self.updated_at = state_dict["updated_at"]

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the teacher if the optimizer has stepped."""
        step = trainer.global_step
        if step == self.updated_at:
            return
        module.teacher.update_(module.student, step)
        self.updated_at = step
        every = trainer.log_every_n_steps  # 0 is never
        if every and step % every == 0:
            module.log("train/teacher_distance", module.teacher.distance(module.student))


class SamplerWatch(L.Callback):
    """Warns once when the mean |log p − log q| of a step is too large, and once when it has grown.

    Args:
        options: Where that begins, and whether the run stops.
    """

    def __init__(self, options: Mismatch) -> None:
        self.options = options
        self._judged_at = 0
        self._first: list[float] = []
        self._warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """What the run's first steps were like."""
        return {"first": self._first, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._first, self._warned = list(state_dict["first"]), set(state_dict["warned"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is judged before the next optimizer step, also in a resumed run."""
        self._judged_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge each optimizer step.

        Raises:
            UserError: Above `stop_above`.
        """
        if trainer.global_step == self._judged_at or METRIC not in trainer.callback_metrics:
            return
        self._judged_at = trainer.global_step
        # Of the whole window and all ranks, so that all come to the same decision.
        self.judge(float(trainer.callback_metrics[METRIC]), trainer.global_step)

    def judge(self, difference: float, step: int) -> None:
        """Judge the mean |log p − log q| of a step.

        Args:
            difference: In nats.
            step: Optimizer step.

        Raises:
            UserError: Above `stop_above`.
        """
        found = f"step {step}: trainer and sampler differ by {difference:.3g} nats a token"
        stop = self.options.stop_above
        # A comparison with NaN is false: what is no number must not pass.
        if stop is not None and not difference <= stop:
            raise UserError(f"model.mismatch: {found}, stop_above is {stop:g}. {_CAUSES}.")
        if not difference <= self.options.warn_above:
            self._warn("above", f"{found}, more than warn_above = {self.options.warn_above:g}")
        if len(self._first) < _FIRST_STEPS:
            self._first.append(difference)
            return
        start = max(_LEAST_START, float(torch.tensor(self._first).nanmean()))
        if not difference <= self.options.warn_growth * start:
            self._warn(
                "growth",
                f"{found}, more than warn_growth = {self.options.warn_growth:g} times that of the "
                f"run's first steps ({start:.3g})",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(f"model.mismatch: {text}. {_CAUSES}. This is said once.")


class ValidateAtEnds(L.Callback):
    """Runs a validation at both ends of a fit that has benchmarks; other fits are left alone."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """What the model can do before training: the base of the retention."""
        if trainer.global_step == 0:
            self._validate(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """What it can do in the end, unless the last validation has told."""
        if module.evaluator.capability.measured_at != trainer.global_step:
            self._validate(trainer, module)

    def _validate(self, trainer: Any, module: Any) -> None:
        data = task_data(trainer)
        if data is None or data.benchmark_suite is None:
            return
        module.evaluator.capability.forced = True
        # As Lightning's own epoch loop runs a validation in the middle of a fit.
        first_loop_iter = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first_loop_iter


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


def callbacks_of_every_run() -> list[L.Callback]:
    """Benchmarks at both ends, the last step saved, whole windows, TensorBoard laid out."""
    return [
        ValidateAtEnds(),
        EffectiveUpdate(),
        LastCheckpoint(),
        RunLength(),
        WholeWindows(),
        Dashboard(),
    ]


class Dashboard(L.Callback):
    """Lays out TensorBoard's tab Custom Scalars: what is learned, what is kept, drift; training."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Write the layout of what this run will log; that of a resumed run replaces it."""
        writer = tensorboard(trainer) if trainer.is_global_zero else None
        if writer is None:
            return
        data = task_data(trainer)
        names = training_names(module, trainer, trainer.callbacks)
        names += validation_names(module, data, trainer.callbacks)
        layout = dashboard_layout(names, [] if data is None else list(data.held_out))
        if layout:
            writer.add_custom_scalars(layout)


# Charts of training by title, each with the names that it shows.
_TRAINING_CHARTS = {
    "Loss and KL": ("loss", "kl", "retained_kl"),
    "Tokens of a completion": ("completion_length",),
    "Cut off": ("truncated_fraction", "retained_truncated"),
    "Teacher's distance": ("teacher_distance",),
}
_NO_ABILITY = ("answer_words", "answer_distinct_2")


def dashboard_layout(names: list[str], held_out: list[str]) -> dict[str, dict[str, list[Any]]]:
    """Charts by category and title, for `SummaryWriter.add_custom_scalars`.

    Args:
        names: What a run logs.
        held_out: Names of the graded sets on which nothing should change.

    Returns:
        The first category opens with new ability, kept abilities and drift side by side. Charts
        and categories without a name are left out.
    """
    kept = {f"val/task/{name}/accuracy" for name in held_out}
    charts: dict[str, list[str]] = {
        title: [] for title in ("New ability", "Kept abilities", "Drift", "Lost", "Perplexity")
    }
    for name in names:
        kind = name.partition("/")[2].partition("/")[0]
        if name in kept:
            charts["Kept abilities"].append(name)
        elif kind == "task" and name.endswith("accuracy"):
            charts["New ability"].append(name)
        elif kind == "drift":
            charts["Drift"].append(name)
        elif kind == "paired" and name.endswith("/lost"):
            charts["Lost"].append(name)
        elif kind == "capability" and not name.endswith(("_stderr", *_NO_ABILITY)):
            is_text = any(part in name for part in ("perplexity", "bits_per_byte"))
            charts["Perplexity" if is_text else "Kept abilities"].append(name)
    found = {
        "Learned and kept": charts,
        "Training": {
            title: [f"train/{each}" for each in wanted if f"train/{each}" in names]
            for title, wanted in _TRAINING_CHARTS.items()
        },
    }
    shown = {
        category: {title: ["Multiline", _as_patterns(tags)] for title, tags in of.items() if tags}
        for category, of in found.items()
    }
    return {category: of for category, of in shown.items() if of}


def _as_patterns(tags: list[str]) -> list[str]:
    """TensorBoard looks for tags that begin as a regular expression says."""
    return [f"{re.escape(tag)}$" for tag in tags]
