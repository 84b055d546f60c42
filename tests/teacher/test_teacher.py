"""The teacher: where it stands after the student moved, and that nothing else can move it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdft_lightning.errors import UserError
from sdft_lightning.models.randomness import turn_off_randomness_
from sdft_lightning.teacher import EMATeacher, FrozenTeacher, LiveTeacher, Teacher, ema_
from sdft_lightning.types import Tokens

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


class Parent(nn.Module):
    """Student and teacher side by side, as in the training module."""

    def __init__(self, student: nn.Module, teacher: Teacher) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher


def taught(teacher: Teacher, student: Any) -> Any:
    teacher.copy_from(student)
    return teacher


def states(teacher: Any, prompt: list[int] | None = None) -> Tensor:
    """The teacher's hidden states for one prompt and two completion tokens."""
    prompt_ids = torch.tensor([prompt or [5, 6, 7]])
    mask = torch.ones_like(prompt_ids).bool()
    completion = torch.tensor([[8, 9]])
    kept = torch.ones_like(completion).bool()
    result: Tensor = teacher(Tokens(prompt_ids, mask), Tokens(completion, kept), kept)
    return result


@torch.no_grad()
def move_(model: nn.Module, by: float = 0.1) -> None:
    for parameter in model.parameters():
        parameter.add_(by)


def storages(module: nn.Module) -> set[int]:
    return {t.data_ptr() for t in (*module.parameters(), *module.buffers())}


def gpt2(dropout: float) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config)


def train_in_mixed_bfloat16(model: Any, steps: int) -> Iterator[int]:
    """AdamW on random tokens; yields the number of the step after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        ids = torch.randint(5, 200, (2, 8), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def test_average_after_200_updates_equals_the_float64_formula(model: Any) -> None:
    teacher = taught(EMATeacher(0.01), model.train())
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    start = {name: p.clone() for name, p in expected.items()}
    for step in train_in_mixed_bfloat16(model, 200):
        teacher.update_(model, step)
        for name, parameter in model.named_parameters():
            expected[name] = 0.99 * expected[name] + 0.01 * parameter.detach().double()
    moved = 0.0
    for name, parameter in teacher.network.named_parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=1e-5)
        moved = max(moved, float((parameter.double() - start[name]).abs().max()))
    assert moved > 1e-2  # a teacher that stayed would be far outside the tolerance


def test_ema_moves_by_the_rate_toward_the_student() -> None:
    average = torch.tensor([1.0, -2.0])
    ema_(average, torch.tensor([2.0, 0.0], dtype=torch.bfloat16), 0.25)
    assert average.tolist() == [1.25, -1.5]


def test_rate_one_copies_the_student(model: Any) -> None:
    teacher = taught(EMATeacher(1.0), model)
    move_(model)
    teacher.update_(model, 1)
    assert teacher.distance(model) == 0.0


def test_every_updates_at_multiples_only(model: Any) -> None:
    teacher = taught(EMATeacher(0.5, every=3), model)
    move_(model)
    distances = []
    for step in range(1, 7):
        teacher.update_(model, step)
        distances.append(teacher.distance(model))
    first = distances[0]
    assert first > 0
    expected = [first, first, first / 2, first / 2, first / 2, first / 4]
    assert distances == pytest.approx(expected, rel=1e-3)


def test_an_update_leaves_the_student_alone(model: Any) -> None:
    teacher = taught(EMATeacher(0.5), model)
    move_(model)
    before = [p.clone() for p in model.parameters()]
    teacher.update_(model, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [EMATeacher, FrozenTeacher])
def test_teacher_and_student_share_no_storage(
    make_model: Callable[..., Any], tied: bool, kind: type[Teacher]
) -> None:
    student = make_model(tie_word_embeddings=tied)
    teacher = taught(kind(), student)
    assert not storages(teacher) & storages(student)
    embedding, head = (
        teacher.network.get_input_embeddings().weight,
        teacher.network.get_output_embeddings().weight,
    )
    assert (embedding is head) == tied
    assert teacher.gather_head().weight is head


def test_a_tied_teacher_stays_tied_after_casts_and_updates(model: Any) -> None:
    teacher = taught(EMATeacher(0.1), model)
    Parent(model, teacher).to(torch.bfloat16)
    teacher.update_(model, 1)
    network = teacher.network
    assert network.get_input_embeddings().weight is network.get_output_embeddings().weight


def test_tied_weights_are_averaged_once(model: Any) -> None:
    teacher = taught(EMATeacher(0.5), model)
    before = teacher.gather_head().weight.clone()
    move_(model, 0.2)
    teacher.update_(model, 1)
    torch.testing.assert_close(teacher.gather_head().weight, before + 0.1)


def test_a_bfloat16_student_gets_a_float32_teacher(make_model: Callable[..., Any]) -> None:
    student = make_model().to(torch.bfloat16)
    teacher = taught(EMATeacher(0.01), student)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    exact = {name: p.detach().double() for name, p in student.named_parameters()}
    move_(student, 0.01)
    teacher.update_(student, 1)
    for (name, mine), theirs in zip(
        teacher.network.named_parameters(), student.parameters(), strict=True
    ):
        # A bfloat16 average would not move at all by a hundredth of such a step.
        expected = 0.99 * exact[name] + 0.01 * theirs.double()
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=1e-6)


def test_casting_the_parent_leaves_the_teacher_float32_and_exact(model: Any) -> None:
    teacher = taught(EMATeacher(), model)
    exact = {name: t.clone() for name, t in teacher.state_dict().items()}
    buffers = [b.clone() for b in teacher.buffers()]
    parent = Parent(model, teacher).to(torch.bfloat16)
    parent.half()
    assert next(model.parameters()).dtype == torch.float16
    for name, tensor in teacher.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact[name])
    assert all(torch.equal(a, b) for a, b in zip(buffers, teacher.buffers(), strict=True))


@pytest.mark.parametrize("dropout_off", [True, False])
def test_train_mode_of_the_parent_does_not_reach_the_teacher(dropout_off: bool) -> None:
    student = gpt2(dropout=0.5)
    if dropout_off:
        turn_off_randomness_(student)
    teacher = taught(EMATeacher(), student)
    parent = Parent(student, teacher).eval()
    quiet = states(teacher)
    own = student(IDS).logits
    parent.train()
    teacher.train()
    assert student.training
    assert not any(module.training for module in teacher.modules())
    for _ in range(3):
        assert torch.equal(states(teacher), quiet)
    assert torch.equal(student(IDS).logits, own) == dropout_off


def test_a_copy_of_a_student_in_train_mode_is_in_eval_mode() -> None:
    student = gpt2(dropout=0.5).train()
    teacher = taught(EMATeacher(), student)
    assert torch.equal(states(teacher), states(teacher))
    assert student.training


def test_no_gradient_reaches_the_teacher(model: Any) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    teacher = taught(EMATeacher(), model)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not states(teacher).requires_grad
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"update_rate": 0.0}, "teacher.update_rate"),
        ({"update_rate": 1.01}, "teacher.update_rate"),
        ({"every": 0}, "teacher.every"),
    ],
)
def test_rates_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        EMATeacher(**options)


def test_another_model_is_refused_and_not_paired_by_place(
    make_model: Callable[..., Any], model: Any
) -> None:
    teacher = taught(EMATeacher(), model)
    with pytest.raises(UserError, match=r"teacher.*layers\.2"):
        teacher.update_(make_model(num_hidden_layers=3), 1)
    with pytest.raises(UserError, match="teacher"):
        teacher.distance(make_model(tie_word_embeddings=False))


def test_before_any_copy_the_teacher_says_so() -> None:
    for teacher in (EMATeacher(), FrozenTeacher(), LiveTeacher()):
        with pytest.raises(RuntimeError, match="copy_from"):
            _ = teacher.network
