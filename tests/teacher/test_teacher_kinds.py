"""The frozen and the live teacher, distances, and what a checkpoint holds of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdft_lightning.teacher import EMATeacher, FrozenTeacher, LiveTeacher, Teacher
from sdft_lightning.types import Tokens


def taught(teacher: Teacher, student: Any) -> Any:
    teacher.copy_from(student)
    return teacher


def states(teacher: Any) -> Tensor:
    prompt = torch.tensor([[5, 6, 7], [5, 9, 11]])
    completion = torch.tensor([[8, 9], [8, 3]])
    kept = torch.ones_like(completion).bool()
    result: Tensor = teacher(
        Tokens(prompt, torch.ones_like(prompt).bool()), Tokens(completion, kept), kept
    )
    return result


@torch.no_grad()
def move_(model: nn.Module, by: float = 0.1) -> None:
    for parameter in model.parameters():
        parameter.add_(by)


def test_a_frozen_teacher_never_moves(model: Any) -> None:
    teacher = taught(FrozenTeacher(), model)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    move_(model)
    for step in range(1, 4):
        teacher.update_(model, step)
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())


def test_a_frozen_teacher_with_cached_prompts_answers_the_same(model: Any) -> None:
    plain, cached = taught(FrozenTeacher(), model), taught(FrozenTeacher(True), model)
    for _ in range(2):
        torch.testing.assert_close(states(cached), states(plain), rtol=1e-4, atol=1e-5)


def test_cached_prompts_are_forgotten_when_a_parent_loads_other_weights(
    make_model: Callable[..., Any],
) -> None:
    teacher = taught(FrozenTeacher(cache_prompts=True), make_model())
    parent = nn.ModuleDict({"teacher": teacher})
    states(teacher)  # remembered under the former weights
    other = taught(FrozenTeacher(), make_model(seed=1))
    parent.load_state_dict({f"teacher.{name}": t for name, t in other.state_dict().items()})
    torch.testing.assert_close(states(teacher), states(other), rtol=1e-4, atol=1e-5)


def test_cached_prompts_are_forgotten_when_another_student_is_copied(
    make_model: Callable[..., Any],
) -> None:
    teacher = taught(FrozenTeacher(cache_prompts=True), make_model())
    states(teacher)
    other = make_model(seed=1)
    teacher.copy_from(other)
    expected = states(taught(FrozenTeacher(), other))
    torch.testing.assert_close(states(teacher), expected, rtol=1e-4, atol=1e-5)


def test_a_live_teacher_is_the_student_and_has_no_state(model: Any) -> None:
    teacher = taught(LiveTeacher(), model)
    assert teacher.network is model
    assert teacher.state_dict() == {}
    assert list(teacher.parameters()) == []
    assert teacher.distance(model) == 0.0
    before = states(teacher)
    move_(model)
    teacher.update_(model, 1)
    assert (states(teacher) - before).abs().max() > 1e-3


def test_a_live_teacher_answers_in_eval_mode_without_gradient(model: Any) -> None:
    seen = []
    model.model.norm.register_forward_hook(lambda module, *_: seen.append(module.training))
    model.train()
    result = states(taught(LiveTeacher(), model))
    assert seen
    assert not any(seen)
    assert not result.requires_grad
    assert all(module.training for module in model.modules())


def test_a_live_teacher_puts_the_mode_of_every_part_back(model: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    states(taught(LiveTeacher(), model))
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training


def test_a_live_teacher_puts_the_mode_back_after_an_error(model: Any) -> None:
    teacher = taught(LiveTeacher(), model.train())

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        states(teacher)
    assert model.training


def test_a_live_teacher_keeps_the_student_trainable_in_a_parent(model: Any) -> None:
    parent = nn.ModuleDict({"student": model, "teacher": taught(LiveTeacher(), model)})
    parent.train()
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_distance_is_the_relative_norm_over_all_parameters(model: Any) -> None:
    teacher = taught(EMATeacher(), model)
    assert teacher.distance(model) == 0.0
    move_(model, 0.1)
    flat = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    by_hand = 0.1 * flat.numel() ** 0.5 / float(flat.norm())  # tied weights count once
    assert teacher.distance(model) == pytest.approx(by_hand, rel=1e-5)


def test_distance_of_a_double_is_one_half() -> None:
    student = nn.Linear(3, 2, bias=False)
    teacher = taught(EMATeacher(), student)
    with torch.no_grad():
        student.weight.mul_(2)
    assert teacher.distance(student) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", [EMATeacher, FrozenTeacher])
def test_a_teacher_is_part_of_its_parents_checkpoint(
    make_model: Callable[..., Any], kind: type[Teacher]
) -> None:
    teacher = taught(kind(), make_model())
    move_(teacher.network, 0.3)
    saved = nn.ModuleDict({"teacher": teacher}).state_dict()
    fresh = taught(kind(), make_model(seed=5))
    nn.ModuleDict({"teacher": fresh}).load_state_dict(saved)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
        assert fresh.state_dict()[name].data_ptr() != tensor.data_ptr()
    assert torch.equal(states(fresh), states(teacher))
