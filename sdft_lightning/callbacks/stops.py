"""Stops a run that has collapsed or has used its tokens, says why, and keeps what is good."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torchmetrics import SumMetric

from sdft_lightning.errors import UserError
from sdft_lightning.files.checkpoint_io import has_finite_weights
from sdft_lightning.files.run_folder import append_lines, run_folder, unused_path
from sdft_lightning.files.whole_windows import is_below
from sdft_lightning.models.sharding import local

# What a sign looks at; the guard reads these names under train/.
WATCHED = ("loss", "distinct_2", "truncated_fraction", "student_entropy", "teacher_entropy")
# Repetition runs to the length limit. Short answers of one form, like labels, repeat each other
# and end: they are no collapse.
_MOST_END = 0.5


@dataclass(frozen=True)
class CollapseLimits:
    """Where a value becomes a sign of collapse; null switches a sign off.

    Shares are of the run's first step, whose completions the untrained model wrote: how much text
    repeats itself, or how sure a model is, differs from task to task.

    Args:
        distinct_2: Repetition: distinct word pairs fell below this share of the first step's, while
            at least half of the completions run to the length limit.
        truncated_fraction: Completions no longer end: at least this fraction runs to the length
            limit, and at the first step less than half as many did.
        student_entropy: The student is certain of everything: its entropy fell below this share of
            the first step's. A task whose right answer is one certain text may need a lower one.
        student_uniform: The student knows nothing: its entropy rose above this share of log V, the
            entropy of a uniform distribution, below which the first step's was.
        teacher_entropy: The teacher knows nothing: its entropy is above this share of log V.
        teacher_lead: Its answers are no better: teacher_accuracy − accuracy is at most this.
    """

    distinct_2: float | None = 0.25
    truncated_fraction: float | None = 0.95
    student_entropy: float | None = 0.02
    student_uniform: float | None = 0.9
    teacher_entropy: float | None = 0.9
    teacher_lead: float | None = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        for name, value in vars(self).items():
            if name == "teacher_lead":
                continue
            if value is not None and not 0 < value <= 1:
                raise UserError(
                    f"CollapseGuard.limits.{name}: got {value}, allowed are shares above 0 and up "
                    "to 1, or null to leave this sign out."
                )


def known_signs(logged: Collection[str]) -> list[str]:
    """The signs that can be judged from the values that a method logs, see `step_signs`."""
    of = {"loss": "loss", "distinct_2": "repetition", "truncated_fraction": "truncation"}
    found = ["weights", *(sign for name, sign in of.items() if name in logged)]
    if "teacher_entropy" in logged:
        found += ["entropy", "student_uniform", "teacher_uniform"]
    return found


def step_signs(
    now: Mapping[str, float], first: Mapping[str, float], limits: CollapseLimits, vocabulary: int
) -> dict[str, str]:
    """Which signs of collapse a training step shows.

    Args:
        now: Values of the step by the names of `WATCHED`; a method that logs fewer shows fewer.
            `largest_weight`: the largest absolute value of a trained weight after the step.
        first: Those of the run's first step.
        limits: Where the signs begin.
        vocabulary: V.

    Returns:
        A sentence for each sign, by name: loss, weights, repetition, truncation, entropy,
        student_uniform, teacher_uniform.
    """
    found: dict[str, str] = {}
    if not math.isfinite(now.get("loss", 0.0)):
        found["loss"] = f"the loss is {now['loss']}"
    if not math.isfinite(now.get("largest_weight", 0.0)):
        found["weights"] = f"a trained weight is {now['largest_weight']} after the step"
    truncated = now.get("truncated_fraction", 0.0)
    low = _share(limits.distinct_2, first.get("distinct_2"))
    if low is not None and now["distinct_2"] < low and truncated >= _MOST_END:
        found["repetition"] = "completions repeat themselves: " + _from("distinct_2", now, first)
    limit = limits.truncated_fraction
    if limit is not None and truncated >= limit > 2 * first.get("truncated_fraction", 1.0):
        found["truncation"] = "completions no longer end: " + _from(
            "truncated_fraction", now, first
        )
    if "teacher_entropy" in now:  # on demonstrations (SFT) entropy falls: they are learned by heart
        found |= _entropy_signs(now, first, limits, math.log(vocabulary))
    return found


def _entropy_signs(
    now: Mapping[str, float], first: Mapping[str, float], limits: CollapseLimits, uniform: float
) -> dict[str, str]:
    found: dict[str, str] = {}
    low = _share(limits.student_entropy, first["student_entropy"])
    if low is not None and now["student_entropy"] < low:
        found["entropy"] = "the student is certain of all: " + _from("student_entropy", now, first)
    high = _share(limits.student_uniform, uniform)
    if high is not None and now["student_entropy"] > high >= first["student_entropy"]:
        found["student_uniform"] = (
            f"the student knows nothing: {_from('student_entropy', now, first)}, a uniform "
            f"distribution has {uniform:.3g}"
        )
    high = _share(limits.teacher_entropy, uniform)
    if high is not None and now["teacher_entropy"] > high:
        found["teacher_uniform"] = (
            f"the teacher knows nothing: teacher_entropy {now['teacher_entropy']:.3g} nats, a "
            f"uniform distribution has {uniform:.3g}"
        )
    return found


def _from(name: str, now: Mapping[str, float], first: Mapping[str, float]) -> str:
    return f"{name} {now[name]:.3g}, at the first step {first[name]:.3g}"


def validation_signs(metrics: Mapping[str, float], limits: CollapseLimits) -> dict[str, str]:
    """Which signs a validation shows.

    Args:
        metrics: What was logged, by whole names such as val/task/<name>/accuracy.
        limits: Where the signs begin.

    Returns:
        `teacher_no_better` with its sentence, if a task whose teacher was graded shows it.
    """
    for name, teacher in metrics.items():
        base, _, metric = name.rpartition("/")
        student = metrics.get(f"{base}/accuracy")
        if metric != "teacher_accuracy" or student is None or limits.teacher_lead is None:
            continue
        if teacher - student <= limits.teacher_lead:
            sentence = (
                f"the teacher no longer beats the student: {name} {teacher:.3g}, accuracy "
                f"{student:.3g}; it has nothing more to teach"
            )
            return {"teacher_no_better": sentence}
    return {}


def _share(share: float | None, whole: float | None) -> float | None:
    return None if share is None or whole is None else share * whole


def best_checkpoint(trainer: Any) -> Path | None:
    """The checkpoint with the best monitored metric; without one, the newest; None before any.

    One whose weights are not all finite is passed over, and so is one of another run, which a
    resumed run may name.

    Args:
        trainer: Of a fit.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            for path in (callback.best_model_path, callback.last_model_path):
                own = bool(path) and is_below(path, callback.dirpath)
                if own and Path(path).is_file() and has_finite_weights(Path(path)):
                    return Path(path)
    return None


def kept_checkpoint(trainer: Any, name: str) -> Path | None:
    """The file of a name that `keep_checkpoint` gave in one of a run's checkpoint folders, or None.

    Args:
        trainer: Of a fit.
        name: From a checkpoint, so whatever somebody wrote there.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            for path in Path(callback.dirpath).rglob("kept-*"):
                if path.name == name and is_below(path, callback.dirpath):
                    return path
    return None


def keep_checkpoint(path: Path) -> Path:
    """Give a checkpoint a second name beside its own: a hard link, or a copy where none can be.

    Args:
        path: An existing file.

    Returns:
        `kept-<name>` in the same folder.
    """
    kept = path.with_name(f"kept-{path.name}")
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:
        shutil.copyfile(path, kept)
    return kept


log = logging.getLogger(__name__)
_IN_VALIDATION = ("teacher_no_better",)
_AT_ONCE = ("weights", "loss")


class CollapseGuard(L.Callback):
    """Stops, or warns, when signs of collapse last; writes stopped.json and guard/<sign>.

    guard/<sign> counts the steps in a row that showed a sign. When the first sign shows, the best
    checkpoint (by the monitored metric; without one, the newest) whose weights are finite is kept
    under a second name, checkpoints/kept-<its name>; the run's own clearing up does not touch it.

    Args:
        action: stop the run, or only warn.
        steps: Optimizer steps in a row that must show a sign. A loss or a weight that is no number:
            one.
        validations: Validations in a row in which the teacher must not beat the student; needs
            model.evaluation.teacher_in_fit.
        limits: Where the signs begin.
    """

    def __init__(
        self,
        action: Literal["stop", "warn"] = "stop",
        steps: int = 5,
        validations: int = 2,
        limits: CollapseLimits = CollapseLimits(),
    ) -> None:
        for name, value in (("steps", steps), ("validations", validations)):
            if value < 1:
                raise UserError(f"CollapseGuard.{name}: got {value}, allowed are 1 and more.")
        self.action = action
        self.steps = steps
        self.validations = validations
        self.limits = limits
        self._judged_at = 0
        self._losses: list[Tensor] = []
        self._first: dict[str, float] = {}
        self._in_a_row: dict[str, int] = {}
        self._kept: Path | None = None
        self._kept_name = ""  # of a resumed run, until its folder is known
        self.stopped = ""  # the reason, once the run is being stopped

    def step_names(self, module: Any, trainer: Any) -> list[str]:
        """What is logged of a step."""
        logged = {name.removeprefix("train/") for name in module.step_names}
        return [f"guard/{sign}" for sign in known_signs(logged & set(WATCHED))]

    def state_dict(self) -> dict[str, Any]:
        """What the judgement of later steps depends on; of the kept checkpoint its name only."""
        kept = "" if self._kept is None else self._kept.name
        return {"first": self._first, "in_a_row": self._in_a_row, "kept": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._first, self._kept_name = dict(state_dict["first"]), Path(state_dict["kept"]).name
        self._in_a_row = dict(state_dict["in_a_row"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is judged before the next optimizer step, also in a resumed run."""
        self._judged_at = trainer.global_step
        self._losses = []
        if self._kept_name:
            self._kept, self._kept_name = kept_checkpoint(trainer, self._kept_name), ""
        evaluation = getattr(pl_module, "evaluation", None)
        ungraded = evaluation is not None and not evaluation.teacher_in_fit
        if ungraded and self.limits.teacher_lead is not None and trainer.is_global_zero:
            log.warning(
                "CollapseGuard: limits.teacher_lead is never judged: validations of this fit do "
                "not grade the teacher. Give --model.evaluation.teacher_in_fit=true, or set "
                "limits.teacher_lead to null."
            )

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge each optimizer step, before a checkpoint of it is written."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._losses += [loss.detach()] if isinstance(loss, Tensor) else []
        if trainer.global_step == self._judged_at:
            return
        self._judged_at = trainer.global_step
        now = self._values(trainer, module)
        self._first = self._first or now
        vocabulary = module.student.get_output_embeddings().weight.shape[0]  # not gathered
        judged = known_signs(now.keys())
        self._count(trainer, step_signs(now, self._first, self.limits, vocabulary), judged)
        for name in judged:
            module.log(f"guard/{name}", float(self._in_a_row[name]))

    def _values(self, trainer: Any, module: Any) -> dict[str, float]:
        """What the signs look at: means over ranks, so that all come to the same decision."""
        logged = {
            name: trainer.callback_metrics[f"train/{name}"].float().to(module.device)
            for name in WATCHED
            if f"train/{name}" in trainer.callback_metrics
        }
        if "loss" in logged:
            # Also what only the trained loss shows; 0 · NaN and 0 · inf are NaN.
            logged["loss"] = logged["loss"] + 0 * sum(each.float() for each in self._losses)
        self._losses = []
        logged["largest_weight"] = largest_weight(module.student)
        means = trainer.strategy.reduce(torch.stack(list(logged.values())), reduce_op="mean")
        return dict(zip(logged, means.tolist(), strict=True))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Judge the teacher's lead, where both were graded in this validation."""
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not trainer.sanity_checking and any("/teacher_accuracy" in name for name in measured):
            self._count(trainer, validation_signs(measured, self.limits), _IN_VALIDATION)

    def _count(self, trainer: Any, found: dict[str, str], judged: Iterable[str]) -> None:
        for name in judged:
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if name in found else 0
        self._keep_or_release(trainer, any(self._in_a_row.values()))
        for name, sentence in found.items():
            unit, needed = ("steps", 1 if name in _AT_ONCE else self.steps)
            if name in _IN_VALIDATION:
                unit, needed = "validations", self.validations
            times = self._in_a_row[name]
            if times == needed or (times > needed and self.action == "stop"):
                self._act(trainer, name, f"{sentence} ({times} {unit} in a row)")
                return

    def _keep_or_release(self, trainer: Any, suspicious: bool) -> None:
        """Keep the best checkpoint while signs show; its second name goes when they pass."""
        if suspicious and not self._kept and trainer.is_global_zero:
            best = best_checkpoint(trainer)
            self._kept = None if best is None else keep_checkpoint(best)
        elif not suspicious and self._kept:
            self._kept.unlink(missing_ok=True)
            self._kept = None

    def _act(self, trainer: Any, sign: str, reason: str) -> None:
        stop = self.action == "stop"
        trainer.should_stop = trainer.should_stop or stop
        self.stopped = reason if stop else self.stopped
        if not trainer.is_global_zero:
            return
        step, kept = trainer.global_step, None if self._kept is None else str(self._kept)
        record = {"stage": "guard", "step": step, "action": self.action, "sign": sign}
        record |= {"reason": reason, "best_checkpoint": kept}
        append_lines(run_folder(trainer) / "metrics.jsonl", [record])
        if stop:
            text = json.dumps(record, indent=2, ensure_ascii=False)
            unused_path(run_folder(trainer) / "stopped.json").write_text(text, encoding="utf-8")
        done = "Stopped" if stop else "Warning"
        best = kept or "none was written before the first sign"
        log.warning(f"CollapseGuard: {done} at step {step}: {reason}. Best checkpoint: {best}.")


@torch.no_grad()
def largest_weight(model: Any) -> Tensor:
    """The largest absolute value of the trained weights on this process, NaN if one is NaN.

    Args:
        model: The student, whole or sharded.
    """
    trained = [local(each.detach()) for each in model.parameters() if each.requires_grad]
    largest = [each.abs().max().float() for each in trained if each.numel()]
    return torch.stack(largest).max()  # ()


class TokenBudget(L.Callback):
    """Ends a fit with the optimizer step that reaches so many tokens, over all ranks.

    Tokens are those of completions, or of demonstrations where these are the target.

    Args:
        tokens: How many; without it they are counted only.

    Attributes:
        trained: Tokens so far, those of a resumed run's earlier part included.
    """

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens
        self.trained = 0
        self._counted = SumMetric()
        self._step = 0

    def state_dict(self) -> dict[str, int]:
        """The tokens so far."""
        return {"trained": self.trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.trained = state_dict["trained"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run resumed at its end has nothing left to do."""
        self._step = trainer.global_step
        self._stop_if_reached(trainer)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; an optimizer step is never left half done."""
        self._counted.to(module.device).update(module.completion_tokens)
        self.trained += int(self._counted.compute())  # of all ranks
        self._counted.reset()
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._stop_if_reached(trainer)

    def _stop_if_reached(self, trainer: L.Trainer) -> None:
        if self.tokens is not None and self.trained >= self.tokens:
            trainer.should_stop = True
