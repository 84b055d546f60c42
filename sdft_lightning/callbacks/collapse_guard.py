"""Stops a run that has collapsed, says why, and keeps the checkpoint from before."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from sdft_lightning.callbacks import collapse_signs as signs
from sdft_lightning.callbacks.collapse_signs import CollapseLimits
from sdft_lightning.callbacks.kept_checkpoint import (
    best_checkpoint,
    keep_checkpoint,
    kept_checkpoint,
)
from sdft_lightning.callbacks.run_files import append_lines, run_folder, unused_path
from sdft_lightning.errors import UserError
from sdft_lightning.models.sharding import local

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
        limits: CollapseLimits = CollapseLimits(),  # noqa: B008 - frozen
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
        return [f"guard/{sign}" for sign in signs.known_signs(logged & set(signs.WATCHED))]

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
        judged = signs.known_signs(now.keys())
        self._count(trainer, signs.step_signs(now, self._first, self.limits, vocabulary), judged)
        for name in judged:
            module.log(f"guard/{name}", float(self._in_a_row[name]))

    def _values(self, trainer: Any, module: Any) -> dict[str, float]:
        """What the signs look at: means over ranks, so that all come to the same decision."""
        logged = {
            name: trainer.callback_metrics[f"train/{name}"].float().to(module.device)
            for name in signs.WATCHED
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
            self._count(trainer, signs.validation_signs(measured, self.limits), _IN_VALIDATION)

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
