"""What moves during a fit, and when: student, teacher, optimizer, modes, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.rollout import Sampling
from sdft_lightning.teacher import EMATeacher, FrozenTeacher, LiveTeacher

FitModule = Callable[..., Any]
Weights = dict[str, Tensor]


def weights(model: Any) -> Weights:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def adamw(lr: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


class Watch(L.Callback):
    """Keeps the student's weights and the learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.students: list[Weights] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.students.append(weights(module.student))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == len(self.students):
            self.students.append(weights(module.student))


def moving_average(students: list[Weights], rate: float, every: int) -> Weights:
    """φ ← (1 − r) φ + r θ in float64, from the first student on."""
    average = {name: value.double() for name, value in students[0].items()}
    for step, student in enumerate(students):
        if step > 0 and step % every == 0:
            for name, value in student.items():
                average[name] = (1 - rate) * average[name] + rate * value.double()
    return average


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (1, 3), (2, 2)])
def test_ema_teacher_equals_the_formula_over_the_students_of_each_optimizer_step(
    every: int, accumulate: int, fit_module: FitModule
) -> None:
    watch = Watch()
    module = fit_module(
        model={"teacher": EMATeacher(0.3, every), "optimizer": adamw(0.01)},
        max_steps=5,
        accumulate_grad_batches=accumulate,
        callbacks=[watch],
    )
    assert len(watch.students) == 6
    expected = moving_average(watch.students, 0.3, every)
    found = weights(module.teacher.model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-6)
        assert (watch.students[-1][name] - watch.students[0][name]).abs().max() > 1e-3
        assert (watch.students[-1][name] - found[name]).abs().max() > 1e-3


def test_ema_of_200_steps_keeps_to_float64_while_the_student_trains_in_bf16_mixed(
    fit_module: FitModule,
) -> None:
    watch = Watch()
    module = fit_module(
        model={"optimizer": adamw(1e-3), "sampling": Sampling(2)},
        data={"batch_size": 1},
        max_steps=200,
        precision="bf16-mixed",
        callbacks=[watch],
    )
    expected = moving_average(watch.students, 0.01, 1)
    for name, value in weights(module.teacher.model).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-5)
        assert (value - watch.students[0][name]).abs().max() > 1e-3


def test_frozen_teacher_stays_as_the_student_was_while_the_student_moves(
    fit_module: FitModule,
) -> None:
    watch = Watch()
    module = fit_module(
        model={"teacher": FrozenTeacher(), "optimizer": adamw(0.01)}, max_steps=3, callbacks=[watch]
    )
    for name, value in weights(module.teacher.model).items():
        assert torch.equal(value, watch.students[0][name])
        assert not torch.equal(value, watch.students[-1][name])


def test_live_teacher_is_the_student_and_leaves_it_in_train_mode(fit_module: FitModule) -> None:
    module = fit_module(model={"teacher": LiveTeacher()}, max_steps=2)
    assert module.teacher.network is module.student
    assert not list(module.teacher.parameters())
    assert all(part.training for part in module.student.modules())


def test_teacher_gets_no_gradient_and_shares_no_storage_with_the_student(
    fit_module: FitModule,
) -> None:
    module = fit_module(max_steps=2)
    teacher = list(module.teacher.parameters())
    assert teacher
    assert all(not each.requires_grad and each.grad is None for each in teacher)
    student = {each.untyped_storage().data_ptr() for each in module.student.parameters()}
    assert student.isdisjoint(each.untyped_storage().data_ptr() for each in teacher)


def test_optimizer_sees_the_students_parameters_only(fit_module: FitModule) -> None:
    module = fit_module()
    groups = module.trainer.optimizers[0].param_groups
    seen = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(id(parameter) for parameter in module.student.parameters())


def test_teacher_moves_once_an_optimizer_step_and_before_the_checkpoint_is_written(
    fit_module: FitModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moved: list[int] = []
    update = EMATeacher.update_

    def counted(self: EMATeacher, student: Any, step: int) -> None:
        moved.append(step)
        update(self, student, step)

    monkeypatch.setattr(EMATeacher, "update_", counted)
    saver = L.pytorch.callbacks.ModelCheckpoint(
        tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1
    )
    module = fit_module(
        model={"optimizer": adamw(0.01)},
        max_steps=3,
        accumulate_grad_batches=2,
        enable_checkpointing=True,
        callbacks=[saver],
    )
    assert moved == [1, 2, 3]
    saved = torch.load(tmp_path / "saved" / "step=3.ckpt", weights_only=True)["state_dict"]
    for name, value in module.teacher.model.named_parameters():
        assert torch.equal(saved[f"teacher.model.{name}"], value)
    earlier = torch.load(tmp_path / "saved" / "step=2.ckpt", weights_only=True)["state_dict"]
    name = "teacher.model.model.norm.weight"
    assert not torch.equal(saved[name], earlier[name])


class Modes(L.Callback):
    """Keeps which parts are in train mode at each training batch and during validation."""

    def __init__(self) -> None:
        self.student: list[set[str]] = []
        self.teacher: set[bool] = set()
        self.validated: list[set[bool]] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        module.student.eval()  # as `from_pretrained` leaves it, and Lightning keeps it

    def on_train_start(self, trainer: Any, module: Any) -> None:
        module.student.model.norm.eval()  # as someone may do who freezes a part

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        parts = module.student.named_modules()
        self.student.append({name for name, part in parts if not part.training})

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.teacher |= {part.training for part in module.teacher.modules()}

    def on_validation_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.validated.append({part.training for part in module.student.modules()})


def test_student_trains_in_train_mode_and_each_part_gets_its_mode_back_after_validation(
    fit_module: FitModule, train_file: Path
) -> None:
    modes = Modes()
    fit_module(
        data={"validation": str(train_file), "grader": "contains"},
        max_steps=4,
        val_check_interval=2,
        callbacks=[modes],
    )
    assert modes.student == [{"model.norm"}] * 4
    assert modes.validated == [{False}] * 2
    assert modes.teacher == {False}


def test_checkpoint_holds_the_teacher_and_loads_with_weights_only(
    fit_module: FitModule, tmp_path: Path
) -> None:
    module = fit_module(model={"optimizer": adamw(0.01)}, max_steps=2)
    module.trainer.save_checkpoint(tmp_path / "all.ckpt")
    checkpoint = torch.load(tmp_path / "all.ckpt", weights_only=True)
    parts = {name.split(".")[0] for name in checkpoint["state_dict"]}
    assert parts == {"student", "teacher"}
    assert checkpoint["sdft_lightning"]["method"] == "SDFTModule"
    assert checkpoint["callbacks"]["TeacherUpdate"] == {"updated_at": 2}
    for name, value in module.state_dict().items():
        assert torch.equal(checkpoint["state_dict"][name], value)
