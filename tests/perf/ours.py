"""Time our own step: `python tests/perf/ours.py sdft|sft '<workload as JSON>'`."""

from __future__ import annotations

# Before torch, as the command line does, so that its setting of large pages counts.
import sdft_lightning  # noqa: F401  # isort: skip

import sys
import time
from collections import defaultdict
from functools import partial
from typing import Any

import lightning as L
import torch
from workload import Workload, make_rows, report, resident_gigabytes, write_rows

from sdft_lightning.data import DemonstrationDataModule
from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.errors import quieten
from sdft_lightning.forward.memory import plan_memory
from sdft_lightning.forward.policy import Policy, model_sizes
from sdft_lightning.modules import SDFTModule, SFTModule
from sdft_lightning.modules.schedule import Schedule
from sdft_lightning.modules.student_checks import average_bytes, memory_setting
from sdft_lightning.rollout import Sampling
from sdft_lightning.teacher import EMATeacher, FrozenTeacher


class Clock(L.Callback):
    """When each optimizer step ended, and what its phases took."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.ends: list[float] = []
        self.phases: dict[str, list[float]] = defaultdict(list)
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self._window: dict[str, float] = defaultdict(float)
        self._tokens = 0

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the micro-batches of a window."""
        for name, seconds in module.timing.seconds.items():
            self._window[name] += seconds
        module.timing.seconds.clear()
        self._tokens += module.completion_tokens
        if (batch_idx + 1) % self.accumulate == 0:
            self.ends.append(time.perf_counter())
            for name, seconds in self._window.items():
                self.phases[name].append(seconds)
            self.tokens.append(self._tokens)
            self.losses.append(float(outputs["loss"]))
            self._window.clear()
            self._tokens = 0


def build(method: str, workload: Workload) -> Any:
    """The module of a method."""
    shared: dict[str, Any] = {
        "policy": Policy(workload.model, gradient_checkpointing=workload.checkpointing),
        "optimizer": partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.0, fused=True),
        "schedule": Schedule(name="constant"),
    }
    if method == "sft":
        return SFTModule(**shared)
    teacher = FrozenTeacher() if workload.frozen_teacher else EMATeacher(update_rate=0.01)
    module = SDFTModule(
        sampling=Sampling(
            max_new_tokens=workload.new_tokens, completions_per_prompt=workload.completions
        ),
        teacher=teacher,
        **shared,
    )
    if workload.forced:
        module.sample_rollouts = partial(_without_stops, module)  # type: ignore[method-assign]
    return module


def _without_stops(module: SDFTModule, batches: Any, step: int) -> Any:
    """Sample while no token ends a completion, so that all have the full length."""
    stops, module.stop_ids = module.stop_ids, []
    try:
        return SDFTModule.sample_rollouts(module, batches, step)
    finally:
        module.stop_ids = stops


def main(method: str, workload: Workload) -> None:
    """Run the steps and print the result line."""
    quieten()
    L.seed_everything(42, verbose=False)
    rows = make_rows(workload, workload.micro_batch * workload.accumulate * workload.steps)
    clock = Clock(workload.accumulate)
    data = DemonstrationDataModule(
        model_name=workload.model,
        train=str(write_rows(rows)),
        prompts=PromptStyle(
            style="template", template=[{"role": "user", "content": "$prompt\n\n$demonstration"}]
        ),
        batch_size=workload.micro_batch,
    )
    trainer = L.Trainer(
        accelerator="gpu" if workload.device == "cuda" else "cpu",
        devices=1,
        precision="32-true" if workload.precision == "float32" else "bf16-mixed",
        max_steps=workload.steps,
        accumulate_grad_batches=workload.accumulate,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    module = build(method, workload)
    # What they import belongs to the libraries.
    model_sizes(module.policy)
    average_bytes(module.optimizer_factory, torch.float32)
    before = resident_gigabytes()
    trainer.fit(module, datamodule=data)
    plan = plan_memory(memory_setting(module, data, trainer))
    report(
        clock.ends,
        clock.phases,
        tokens=clock.tokens[1:],
        losses=clock.losses,
        before_gigabytes=before,
        planned_gigabytes=plan.peak / 1e9,
    )


if __name__ == "__main__":
    main(sys.argv[1], Workload.load(sys.argv[2]))
