"""Teachers of a student with adapters: where they start, how they move, what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import moved_not_cast
from sdft_lightning.models.lora import LoRA, adapter_parameters, add_adapter_, merged_copy
from sdft_lightning.teacher import EMATeacher, FrozenTeacher, LiveTeacher, Teacher
from sdft_lightning.types import Tokens

Make = Callable[..., Any]


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
def move_(model: Any, by: float = 0.1) -> None:
    for parameter in adapter_parameters(model).values():
        parameter.add_(by)


def reverse_modules_(model: nn.Module) -> None:
    """The same modules under the same names, found in the opposite order."""
    for module in list(model.modules()):
        items = list(module._modules.items())
        module._modules.clear()
        module._modules.update(reversed(items))


def test_average_starts_at_the_students_own_a_and_b(make_adapted: Make) -> None:
    student = make_adapted()
    mine = adapter_parameters(taught(EMATeacher(), student).network)
    theirs = adapter_parameters(student)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value)
        assert value.abs().max() > 0
        assert mine[name].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("shuffled", [False, True])
def test_average_after_200_updates_equals_the_float64_formula_by_name(
    make_adapted: Make, shuffled: bool
) -> None:
    student = make_adapted(moved=False)
    teacher = taught(EMATeacher(0.01), student)
    if shuffled:  # q and o, k and v, A and B have equal shapes here: by place they would swap
        reverse_modules_(student)
        assert list(adapter_parameters(student)) != list(adapter_parameters(teacher.network))
    start = {name: p.detach().clone() for name, p in adapter_parameters(student).items()}
    expected = {name: p.double() for name, p in start.items()}
    optimizer = torch.optim.AdamW(adapter_parameters(student).values(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 201):
        ids = torch.randint(5, 200, (2, 8), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = student(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update_(student, step)
        for name, value in adapter_parameters(student).items():
            expected[name] = 0.99 * expected[name] + 0.01 * value.detach().double()
    for name, value in adapter_parameters(teacher.network).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-5)
        assert (value - start[name]).abs().max() > 1e-2


def test_updates_leave_the_frozen_weights_bit_for_bit(make_adapted: Make) -> None:
    student = make_adapted(moved=False)
    teacher = taught(EMATeacher(0.3), student)
    frozen = {n: p.clone() for n, p in student.named_parameters() if "lora_" not in n}
    move_(student)
    for step in range(1, 4):
        teacher.update_(student, step)
    for model in (student, teacher.network):
        found = dict(model.named_parameters())
        assert all(torch.equal(found[name], value) for name, value in frozen.items())


def test_rate_one_makes_the_teacher_the_student(make_adapted: Make) -> None:
    student = make_adapted()
    teacher = taught(EMATeacher(1.0), student)
    move_(student)
    assert teacher.distance(student) > 1e-3
    teacher.update_(student, 1)
    assert teacher.distance(student) == 0.0
    torch.testing.assert_close(states(teacher), states(taught(LiveTeacher(), student)))


def flat(model: Any) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in merged_copy(model).parameters()])


def test_distance_is_that_of_the_merged_weights(make_adapted: Make, make_model: Make) -> None:
    student = make_adapted()
    average, frozen = taught(EMATeacher(), student), taught(FrozenTeacher(), student)
    assert average.distance(student) == 0.0
    other = FrozenTeacher()
    other.hold(make_model(seed=1))  # as re-invoke's: not the student's base
    for parameter in adapter_parameters(average.network).values():
        parameter.mul_(0.5)
    merged = flat(student)
    for teacher, weights in (
        (average, flat(average.network)),
        (frozen, plain(make_model())),
        (other, plain(make_model(seed=1))),
    ):
        expected = float((weights - merged).norm() / merged.norm())
        assert expected > 1e-2
        assert teacher.distance(student) == pytest.approx(expected, rel=1e-4)


def plain(model: Any) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", [EMATeacher, FrozenTeacher])
def test_what_the_student_does_later_does_not_reach_the_teacher(
    make_adapted: Make, kind: type[Teacher]
) -> None:
    student = make_adapted()
    teacher = taught(kind(), student)
    before = states(teacher)
    move_(student)
    student.train()
    assert torch.equal(states(teacher), before)
    assert not states(teacher).requires_grad
    assert not any(part.training for part in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in adapter_parameters(student).values())


@pytest.mark.parametrize("cached", [False, True])
def test_a_frozen_teacher_is_the_base_model_whatever_the_adapters_are(
    make_adapted: Make, make_model: Make, cached: bool
) -> None:
    teacher = taught(FrozenTeacher(cached), make_adapted())
    base = states(taught(FrozenTeacher(), make_model()))
    for _ in range(2):
        torch.testing.assert_close(states(teacher), base, rtol=1e-5, atol=1e-5)


def test_a_live_teacher_has_the_students_adapters(make_adapted: Make) -> None:
    student = make_adapted()
    teacher = taught(LiveTeacher(), student)
    before = states(teacher)
    move_(student)
    assert (states(teacher) - before).abs().max() > 1e-2
    assert teacher.distance(student) == 0.0


@pytest.mark.parametrize("kind", [EMATeacher, FrozenTeacher])
def test_no_second_copy_of_the_frozen_weights_is_held(
    make_adapted: Make, kind: type[Teacher]
) -> None:
    student = make_adapted()
    teacher = taught(kind(), student)
    of_student = {p.untyped_storage().data_ptr() for p in student.parameters()}
    own = [p for p in teacher.parameters() if p.untyped_storage().data_ptr() not in of_student]
    adapters = sum(p.numel() for p in adapter_parameters(student).values())
    assert sum(p.numel() for p in own) == (adapters if kind is EMATeacher else 0)
    mine = adapter_parameters(teacher.network).values()
    assert all(p.untyped_storage().data_ptr() not in of_student for p in mine)


def test_a_cast_to_bfloat16_leaves_all_adapters_float32_and_the_base_shared(
    make_adapted: Make,
) -> None:
    student = make_adapted()
    teacher = taught(EMATeacher(0.01), student)
    with moved_not_cast(student):  # as PolicyModule casts
        nn.ModuleDict({"student": student, "teacher": teacher}).to(torch.bfloat16)
    base = {p.dtype for name, p in student.named_parameters() if "lora_" not in name}
    assert base == {torch.bfloat16}
    for model in (student, teacher.network):
        assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert teacher.network.model.embed_tokens.weight is student.model.embed_tokens.weight
    before = adapter_parameters(teacher.network)
    name, value = next(iter((n, p.clone()) for n, p in before.items() if ".lora_B." in n))
    move_(student, 0.5)
    teacher.update_(student, 1)
    moved = adapter_parameters(student)[name]
    torch.testing.assert_close(before[name], 0.99 * value + 0.01 * moved, rtol=0, atol=1e-6)
    assert states(teacher).isfinite().all()


@pytest.mark.parametrize("kind", [EMATeacher, FrozenTeacher])
def test_a_base_in_bfloat16_stays_bfloat16_below_a_float32_average(
    make_model: Make, kind: type[Teacher], either_processor: bool
) -> None:
    student = make_model().to(torch.bfloat16)
    add_adapter_(student, LoRA(r=4), 0)
    teacher = taught(kind(), student)
    dtypes = {n: p.dtype for n, p in student.named_parameters() if "lora_" not in n}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert {p.dtype for p in adapter_parameters(teacher.network).values()} <= {torch.float32}
    base = {n: p.dtype for n, p in teacher.network.named_parameters() if "lora_" not in n}
    assert set(base.values()) == {torch.bfloat16}
    # A frozen teacher is no adapted model, and may be fused, with float32 states.
    fused = kind is FrozenTeacher and not either_processor
    assert states(teacher).dtype == (torch.float32 if fused else torch.bfloat16)


def test_other_adapters_are_refused_and_not_paired_by_place(make_adapted: Make) -> None:
    teacher = taught(EMATeacher(), make_adapted(LoRA(r=4, target_modules=["q_proj"])))
    with pytest.raises(UserError, match="teacher: its parameters are not the student's"):
        teacher.update_(make_adapted(LoRA(r=4, target_modules=["o_proj"])), 1)
