"""Watches how far the engine that samples is from the student that is trained."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.rollout.mismatch import SamplerAlarm

log = logging.getLogger(__name__)

METRIC = "train/sampler/log_prob_difference"
_FIRST_STEPS = 5
# Growth is counted from here at least: far below, differences are rounding and grow by chance.
_LEAST_START = 0.02
_CAUSES = (
    "Likely causes: the engine samples with old weights, or another run refreshes the same server; "
    "it serves another model or another dtype than the student's; its own sampling defaults are at "
    "work. See docs/vllm.md"
)


class SamplerWatch(L.Callback):
    """Warns once when the mean |log p − log q| of a step is too large, and once when it has grown.

    Args:
        alarm: Where that begins, and whether the run stops.
    """

    def __init__(self, alarm: SamplerAlarm) -> None:
        self.alarm = alarm
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
        stop = self.alarm.stop_above
        # A comparison with NaN is false: what is no number must not pass.
        if stop is not None and not difference <= stop:
            raise UserError(f"model.sampler_alarm: {found}, stop_above is {stop:g}. {_CAUSES}.")
        if not difference <= self.alarm.warn_above:
            self._warn("above", f"{found}, more than warn_above = {self.alarm.warn_above:g}")
        if len(self._first) < _FIRST_STEPS:
            self._first.append(difference)
            return
        start = max(_LEAST_START, float(torch.tensor(self._first).nanmean()))
        if not difference <= self.alarm.warn_growth * start:
            self._warn(
                "growth",
                f"{found}, more than warn_growth = {self.alarm.warn_growth:g} times that of the "
                f"run's first steps ({start:.3g})",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(f"model.sampler_alarm: {text}. {_CAUSES}. This is said once.")
