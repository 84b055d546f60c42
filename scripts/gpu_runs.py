"""Parts of gpu_check.py that train: steps, gradients, a step's memory."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import lightning as L
import torch
from gpu_common import (
    Setting,
    SkippedError,
    WrongError,
    config_of,
    drawn_weights,
    forget_peak,
    held_bytes,
    now,
    peak_bytes,
    write_model,
    write_rows,
)

# --- steps beside those of a CPU ----------------------------------------------------------------

# Loss and student's entropy of three steps, in float32 on a CPU (torch 2.13.0).
RECORDED: dict[str, list[tuple[float, float]]] = {
    "tiny": [
        (2.1435129642486572, 4.494570732116699),
        (1.6560138463974, 4.203672409057617),
        (1.171147346496582, 4.280890941619873),
    ],
    "0.5B": [
        (0.0438520573079586, 11.753591537475586),
        (0.18158112466335297, 11.75108528137207),
        (0.05792536959052086, 11.75222396850586),
    ],
}
_APART = 0.01  # of a figure


def steps(setting: Setting) -> None:
    """Three steps of the command line in float32, beside what a CPU found.

    The likeliest token is taken each time, so that both write the same text.
    """
    from sdft_lightning.cli import main

    name = setting.pick("0.5B", "tiny")
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        write_model(folder / "model", config_of(name))
        write_rows(folder / "rows.jsonl", 6, 40, 20)
        options = {
            "model": "SDFTModule",
            "model.policy.name": folder / "model",
            "model.policy.sampling_dtype": "same",
            "model.sampling.max_new_tokens": 6,
            "model.sampling.top_k": 1,
            "model.teacher": "EMATeacher",
            "model.teacher.update_rate": 0.1,
            "model.optimizer": "torch.optim.SGD",
            "model.optimizer.lr": setting.pick(0.1, 0.03),
            "model.schedule.name": "constant",
            "data.train": folder / "rows.jsonl",
            "data.prompts.style": "turns",
            "data.batch_size": 2,
            "trainer.max_steps": 3,
            "trainer.max_epochs": -1,
            "trainer.accelerator": {"cuda": "gpu"}.get(setting.device, "cpu"),
            "trainer.devices": 1,
            "trainer.precision": "32-true",
            "trainer.logger": "false",
            "trainer.enable_model_summary": "false",
            "trainer.enable_checkpointing": "false",
            "trainer.log_every_n_steps": 1,
            "run.root": folder,
            "run.name": "run",
        }
        with patch.object(sys, "argv", ["sdft"]):  # else Lightning warns of two command lines
            main(["fit", *(f"--{option}={given}" for option, given in options.items())])
        text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [each for each in map(json.loads, text.splitlines()) if each["stage"] == "train"]
    found = [(each["train/loss"], each["train/student_entropy"]) for each in lines]
    compare_steps(setting, name, found, RECORDED[name])


def compare_steps(
    setting: Setting,
    name: str,
    found: Sequence[tuple[float, float]],
    recorded: Sequence[tuple[float, float]],
) -> None:
    """Report (loss, entropy) of steps beside those that were recorded.

    Raises:
        WrongError: If they differ by more than a hundredth.
    """
    if len(found) != len(recorded):
        raise WrongError(f"{len(found)} steps were logged, recorded are {len(recorded)}: {found}")
    worst = 0.0
    for step, (mine, theirs) in enumerate(zip(found, recorded, strict=True), start=1):
        apart = max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
        worst = max(worst, apart)
        setting.figure(
            f"{name}, step {step}",
            loss=mine[0],
            loss_on_a_CPU=theirs[0],
            entropy=mine[1],
            entropy_on_a_CPU=theirs[1],
            apart=apart,
        )
    if not worst <= _APART:
        raise WrongError(
            f"steps differ from those of a CPU by {worst:.1%}, allowed is {_APART:.0%}"
        )


# --- gradients ----------------------------------------------------------------------------------


class GradientWatch(L.Callback):
    """Whether each micro-batch gives each trained weight a gradient.

    Attributes:
        norms: Of the whole gradient, after each micro-batch of the window.
        faults: What is wrong, in words.
    """

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.faults: list[str] = []
        self._before: dict[str, float] = {}

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        """Look at all gradients; those of A are zero as long as B is, of adapters B · A."""
        found = {
            name: 0.0 if each.grad is None else float(each.grad.float().norm())
            for name, each in module.student.named_parameters()
            if each.requires_grad and "lora_A" not in name
        }
        total = sum(norm**2 for norm in found.values()) ** 0.5
        self.norms.append(total)
        number = len(self.norms)
        if not total < float("inf"):
            self.faults.append(f"micro-batch {number}: gradients are no numbers")
        none = [name for name, norm in found.items() if norm == 0]
        same = [name for name, norm in found.items() if norm == self._before.get(name)]
        for what, names in (("without gradient", none), ("that got nothing more", same)):
            if names:
                self.faults.append(
                    f"micro-batch {number}: {len(names)} of {len(found)} weights {what}, e.g. "
                    f"{names[0]}"
                )
        self._before = found


def gradients(setting: Setting) -> None:
    """A window of two micro-batches by each way of training: all weights learn from both."""
    from sdft_lightning.models.lora import LoRA

    config, wrong = config_of(setting.pick("0.5B", "tiny")), []
    ways: dict[str, dict[str, Any]] = {
        "auto": {"sampling_dtype": "auto"},
        "same": {"sampling_dtype": "same"},
        "LoRA": {"lora": LoRA(r=8)},
        "LowMemoryAdamW": {"weights_dtype": "bfloat16", "gradient_checkpointing": True},
    }
    for way, policy in ways.items():
        if way == "LowMemoryAdamW" and importlib.util.find_spec("torchao") is None:
            setting.figure(way, left_out="torchao is not installed (extra low-memory)")
            continue
        watch = GradientWatch()
        start = time.perf_counter()
        fit(setting, config, policy, [watch], low_memory=way == "LowMemoryAdamW")
        setting.figure(
            way,
            first_micro_batch=watch.norms[0],
            both=watch.norms[1],
            seconds=time.perf_counter() - start,
        )
        wrong += [f"{way}, {fault}" for fault in watch.faults]
    if wrong:
        raise WrongError("; ".join(wrong))


class Lengths(NamedTuple):
    """How long rows are, in tokens, and how many are taken at once."""

    prompt: int = 40
    demonstration: int = 20
    new_tokens: int = 8
    batch: int = 2


_FEW = Lengths()


def fit(
    setting: Setting,
    config: Any,
    policy: dict[str, Any],
    callbacks: Sequence[L.Callback],
    low_memory: bool = False,
    lengths: Lengths = _FEW,
    steps: int = 1,
    before: Callable[[Any], None] = lambda module: None,
) -> Any:
    """Train a model with drawn weights, in windows of two micro-batches, under bf16-mixed.

    Args:
        setting: Where.
        config: Of the model.
        policy: Options of the policy, but its name.
        callbacks: Of the Trainer.
        low_memory: Take LowMemoryAdamW.
        lengths: Of rows.
        steps: Optimizer steps.
        before: Called with the module.

    Returns:
        The plan of its memory.
    """
    from sdft_lightning.data import DemonstrationDataModule
    from sdft_lightning.data.prompts import PromptStyle
    from sdft_lightning.forward.memory import plan_memory
    from sdft_lightning.forward.policy import Policy
    from sdft_lightning.modules import SDFTModule
    from sdft_lightning.modules.schedule import Schedule
    from sdft_lightning.modules.student_checks import memory_setting
    from sdft_lightning.rollout import Sampling
    from sdft_lightning.teacher import EMATeacher

    optimizer: Any = torch.optim.AdamW
    if low_memory:
        from sdft_lightning.models.low_memory import LowMemoryAdamW as optimizer
    with tempfile.TemporaryDirectory() as home, drawn_weights(config, setting.device):
        folder = Path(home)
        write_model(folder / "model", config, weights=False)
        count = 2 * lengths.batch * steps
        write_rows(folder / "rows.jsonl", count, lengths.prompt, lengths.demonstration)
        module = SDFTModule(
            policy=Policy(str(folder / "model"), **policy),
            optimizer=partial(optimizer, lr=1e-5),
            schedule=Schedule(name="constant"),
            sampling=Sampling(max_new_tokens=lengths.new_tokens),
            teacher=EMATeacher(update_rate=0.01),
        )
        before(module)
        data = DemonstrationDataModule(
            train=str(folder / "rows.jsonl"),
            prompts=PromptStyle("turns"),
            batch_size=lengths.batch,
        )
        trainer = L.Trainer(
            accelerator="gpu" if setting.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            max_steps=steps,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=home,
            callbacks=list(callbacks),
        )
        trainer.fit(module, datamodule=data)
        return plan_memory(memory_setting(module, data, trainer))


# --- a whole step -------------------------------------------------------------------------------

# Phases of a step's clock: those of its memory plan.
_PLANNED = {
    "rollout": ("sampling",),
    "teacher": ("teacher", "later teacher"),
    "divergence": ("loss", "later loss"),
    "backward": ("backward",),
    "optimizer": ("step",),
}


class Phases(L.Callback):
    """Seconds and peak memory of the phases of the last optimizer step.

    Args:
        device: `cuda` or `cpu`.
        step: Which is measured, from 0; earlier ones make what stays.

    Attributes:
        seconds: By phase; of the whole step as `step`.
        peaks: Bytes by phase, beyond what was held before the run.
    """

    def __init__(self, device: str, step: int) -> None:
        self.device, self.step = device, step
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.before = held_bytes(device)
        self._begun: dict[str, float] = {}
        self._in_step = False

    def watch(self, module: Any) -> None:
        """Follow the clock of a module."""
        timing = module.timing
        start, stop = timing.start, timing.stop

        def started(phase: str) -> None:
            start(phase)
            self.begin(phase)

        def stopped(phase: str) -> None:
            self.end(phase)
            stop(phase)

        timing.start, timing.stop = started, stopped

    def begin(self, phase: str) -> None:
        """A phase begins; that of a whole step holds the others."""
        self._begun[phase] = now(self.device)
        if phase != "step":
            forget_peak(self.device)

    def end(self, phase: str) -> None:
        """It ends."""
        if not self._in_step:
            return
        spent = now(self.device) - self._begun[phase]
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        if phase != "step":
            peak = peak_bytes(self.device) - self.before
            self.peaks[phase] = max(peak, self.peaks.get(phase, 0))

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Measure from the first micro-batch of the step."""
        self._in_step = trainer.global_step == self.step

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """The backward pass is over."""
        self.begin("optimizer")

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The optimizer's step is over, and the teacher's with it."""
        if trainer.global_step == self.step + 1:
            self.end("optimizer")


def whole_step(setting: Setting) -> None:
    """A step in bfloat16 with LowMemoryAdamW and a float32 teacher: seconds and peaks of phases."""
    if importlib.util.find_spec("torchao") is None:
        raise SkippedError("torchao is not installed (extra low-memory)")
    name = setting.pick("7B", "tiny")
    lengths = setting.pick(Lengths(700, 500, 256, 4), _FEW)
    policy = {"weights_dtype": "bfloat16", "gradient_checkpointing": True}
    phases = Phases(setting.device, step=1)  # the first makes averages, and compiles
    given = (setting, config_of(name), policy, [phases], True, lengths, 2)
    plan = fit(*given, before=phases.watch)
    setting.figure(
        f"{name}, 2 x {lengths.batch} prompts of {lengths.prompt}, {lengths.new_tokens} new tokens",
        seconds=phases.seconds["step"],
        peak_gigabytes=max(phases.peaks.values()) / 1e9,
        planned_gigabytes=plan.peak / 1e9,
        exact_part_gigabytes=plan.certain / 1e9,
    )
    for phase, planned in _PLANNED.items():
        setting.figure(
            phase,
            seconds=phases.seconds[phase],
            peak_gigabytes=phases.peaks[phase] / 1e9,
            planned_gigabytes=max(map(plan.at, planned)) / 1e9,
        )
    setting.figure("student", seconds=phases.seconds["student"])
