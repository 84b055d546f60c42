"""Realised over expected movement: what is followed, and what it says of starved weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from sdft_lightning.modules.effective_update import (
    EffectiveUpdate,
    draw_sample,
    effective_movement,
)
from sdft_lightning.teacher import EMATeacher, FrozenTeacher

FitModule = Callable[..., Any]


def adamw(lr: float, decay: float = 0.0) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)


class Logged(L.Callback):
    """Keeps what each step logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_before_zero_grad(self, trainer: Any, *args: Any) -> None:
        self.keep(trainer)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.keep(trainer)

    def keep(self, trainer: Any) -> None:
        values = trainer.callback_metrics.items()
        if trainer.global_step > len(self.steps):
            self.steps.append({name: float(value) for name, value in values if "effective" in name})


def test_ratio_is_a_projection_so_that_sideways_noise_is_no_movement() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert effective_movement(expected, expected) == 1.0
    assert effective_movement(0.2 * expected, expected) == pytest.approx(0.2)
    assert effective_movement(expected + torch.tensor([-8.0, 6.0]), expected) == pytest.approx(1.0)
    assert effective_movement(-expected, expected) == -1.0
    assert effective_movement(expected, torch.zeros(2)) is None


def test_sample_is_the_same_each_time_and_spread_over_the_model(model: Any) -> None:
    named = dict(model.named_parameters())
    one, other = draw_sample(named), draw_sample(named)
    assert one.entries.keys() == other.entries.keys()
    assert len(one.entries) == 16
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= one.entries.keys()
    for name, entries in one.entries.items():
        assert torch.equal(entries, other.entries[name])
        assert int(entries.max()) < named[name].numel()
        assert len(entries) <= 255


def test_float32_student_and_teacher_move_as_expected_through_schedule_clipping_and_accumulation(
    fit_module: FitModule,
) -> None:
    from sdft_lightning.modules.schedule import Schedule

    logged = Logged()
    fit_module(
        model={
            "optimizer": adamw(1e-3, decay=0.1),
            "teacher": EMATeacher(0.1, every=2),
            "schedule": Schedule("cosine", warmup_steps=2),
        },
        callbacks=[logged],
        max_steps=6,
        max_epochs=-1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.01,
        log_every_n_steps=1,
    )
    last = logged.steps[-1]
    assert last["train/effective_update"] == pytest.approx(1.0, abs=2e-4)
    assert last["train/effective_teacher_update"] == pytest.approx(1.0, abs=2e-3)


def test_starved_bfloat16_student_is_told_and_its_float32_teacher_follows_it(
    fit_module: FitModule,
) -> None:
    logged = Logged()
    module = fit_module(
        model={
            "optimizer": adamw(1e-5),
            "teacher": EMATeacher(0.1),
            "policy": {"weights_dtype": "bfloat16", "sampling_dtype": "same"},
        },
        callbacks=[logged],
        max_steps=4,
        log_every_n_steps=1,
    )
    assert {each.dtype for each in module.student.parameters()} == {torch.bfloat16}
    # Weights of σ = 0.3 and a step of 1e-5: hardly one gets past the rounding.
    assert abs(logged.steps[-1]["train/effective_update"]) < 0.2


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_low_memory_student_makes_its_movement_and_its_teacher_stays_float32(
    precision: str, fit_module: FitModule
) -> None:
    from sdft_lightning.models.low_memory import LowMemoryAdamW

    logged = Logged()
    module = fit_module(
        precision=precision,
        model={
            "optimizer": lambda parameters: LowMemoryAdamW(parameters, lr=1e-3),
            "teacher": EMATeacher(0.1),
            "policy": {"weights_dtype": "bfloat16", "sampling_dtype": "same"},
        },
        callbacks=[logged],
        max_steps=6,
        max_epochs=-1,
        log_every_n_steps=1,
    )
    assert {each.dtype for each in module.student.parameters()} == {torch.bfloat16}
    assert {each.dtype for each in module.teacher.parameters()} == {torch.float32}
    assert 0.85 <= logged.steps[-1]["train/effective_update"] <= 1.15
    assert logged.steps[-1]["train/effective_teacher_update"] == pytest.approx(1.0, abs=0.01)


def test_nothing_is_logged_for_a_teacher_that_does_not_average_nor_before_any_movement(
    fit_module: FitModule,
) -> None:
    logged = Logged()
    fit_module(
        model={"teacher": FrozenTeacher(), "optimizer": adamw(0.0)},
        callbacks=[logged],
        max_steps=2,
        log_every_n_steps=1,
    )
    assert logged.steps == [{}, {}]


class Muon(torch.optim.SGD):
    """Stands for an optimizer that moves entries together; its name is not a known one."""


def test_optimizer_that_moves_entries_together_is_left_alone(
    fit_module: FitModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdft_lightning.modules.effective_update._ELEMENTWISE", {"AdamW"})
    logged = Logged()
    fit_module(
        model={"optimizer": lambda parameters: Muon(parameters, lr=0.1)},
        callbacks=[logged],
        max_steps=1,
        log_every_n_steps=1,
    )
    assert logged.steps == [{}]


def test_resumed_run_counts_from_the_start_of_the_run(
    fit_module: FitModule, tmp_path: Path
) -> None:
    def fit(steps: int, **options: Any) -> tuple[Any, Logged]:
        logged = Logged()
        module = fit_module(
            model={"optimizer": adamw(1e-3), "teacher": EMATeacher(0.1)},
            callbacks=[logged],
            max_steps=steps,
            max_epochs=-1,
            log_every_n_steps=1,
            **options,
        )
        return module, logged

    module, _ = fit(3)
    module.trainer.save_checkpoint(tmp_path / "three.ckpt")
    saved = torch.load(tmp_path / "three.ckpt", weights_only=True)
    tensors = saved["callbacks"]["EffectiveUpdate"]["tensors"]
    assert set(tensors) == {"start", "copy", "teacher_start", "teacher_copy"}
    (guard,) = [each for each in module.trainer.callbacks if isinstance(each, EffectiveUpdate)]
    again = EffectiveUpdate()
    again.load_state_dict(saved["callbacks"]["EffectiveUpdate"])
    again.on_train_start(module.trainer, module)
    for name, value in guard._tensors.items():
        assert torch.equal(again._tensors[name], value), name
    assert torch.equal(again._copy.detach(), guard._copy.detach())  # type: ignore[union-attr]
    # Without its state a resumed run does not know where it started: nothing is made up.
    lost = EffectiveUpdate()
    lost.on_train_start(module.trainer, module)
    assert lost.state_dict() == {}
