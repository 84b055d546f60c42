"""The three exact divergences against METHOD §1 in float64, by hand, and at their edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.losses.divergence import forward_kl, generalized_jsd, log_probs, reverse_kl

Function = Callable[..., Tensor]
Array = np.ndarray


def jsd(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    return generalized_jsd(teacher, student, 0.3, temperature)


FUNCTIONS = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "generalized_jsd": jsd}
each_function = pytest.mark.parametrize("name", list(FUNCTIONS))


def softmax(logits: Tensor, temperature: float) -> Array:
    scaled = logits.double().numpy() / temperature
    exps = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def kl(first: Array, second: Array) -> Array:
    return (first * np.log(first / second)).sum(axis=-1)


def by_method(name: str, teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Array:
    """METHOD §1 in float64; the Jensen-Shannon divergence with β = 0.3."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    mixture = 0.3 * p + 0.7 * q
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "generalized_jsd": 0.3 * kl(p, mixture) + 0.7 * kl(q, mixture),
    }[name]


def pair(*shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(*shape, generator=generator) * scale
    return teacher, torch.randn(*shape, generator=generator) * scale


def logits_of(*probs: float) -> Tensor:
    return torch.tensor(probs).log()


@each_function
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_value_is_that_of_the_method_in_float64(name: str, temperature: float) -> None:
    teacher, student = pair(4, 5, 50)
    value = FUNCTIONS[name](teacher, student, temperature)
    assert value.shape == (4, 5)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(
        value.numpy(), by_method(name, teacher, student, temperature), rtol=1e-6, atol=1e-6
    )


def test_two_tokens_by_hand_with_the_teacher_first_in_forward_kl() -> None:
    teacher, student = logits_of(0.75, 0.25), logits_of(0.5, 0.5)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert forward_kl(teacher, student).item() == pytest.approx(forward, abs=1e-6)  # 0.1308
    assert reverse_kl(teacher, student).item() == pytest.approx(reverse, abs=1e-6)  # 0.1438
    assert abs(forward - reverse) > 0.01


def test_three_tokens_by_hand_with_the_weight_on_the_teacher() -> None:
    teacher, student = logits_of(0.5, 0.25, 0.25), logits_of(0.25, 0.5, 0.25)
    # M = 0.8 P + 0.2 Q = (0.45, 0.30, 0.25)
    to_teacher = 0.5 * math.log(0.5 / 0.45) + 0.25 * math.log(0.25 / 0.30)
    to_student = 0.25 * math.log(0.25 / 0.45) + 0.5 * math.log(0.5 / 0.30)
    value = generalized_jsd(teacher, student, 0.8).item()
    assert value == pytest.approx(0.8 * to_teacher + 0.2 * to_student, abs=1e-6)


@each_function
def test_equal_inputs_give_zero_value_and_zero_gradient(name: str) -> None:
    teacher, _ = pair(3, 20, scale=4.0)
    student = teacher.clone().requires_grad_()
    value = FUNCTIONS[name](teacher, student)
    value.sum().backward()
    assert value.abs().max().item() < 1e-6
    assert student.grad is not None
    assert student.grad.abs().max().item() < 1e-6


def test_swapping_the_arguments_turns_forward_into_reverse() -> None:
    teacher, student = pair(6, 20)
    torch.testing.assert_close(forward_kl(teacher, student), reverse_kl(student, teacher))
    assert (forward_kl(teacher, student) - reverse_kl(teacher, student)).abs().min() > 1e-3


@each_function
def test_temperature_divides_both_logits(name: str) -> None:
    teacher, student = pair(6, 20)
    function = FUNCTIONS[name]
    torch.testing.assert_close(function(teacher, student, 2.0), function(teacher / 2, student / 2))
    assert (function(teacher, student, 2.0) - function(teacher, student)).abs().min() > 1e-3


@each_function
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradient_is_that_of_finite_differences(name: str, temperature: float) -> None:
    teacher, start = pair(3, 8)
    student = start.clone().requires_grad_()
    FUNCTIONS[name](teacher, student, temperature).sum().backward()
    step = 1e-5  # differences in float64, through the transcription of METHOD
    numeric = np.zeros((3, 8))
    for place in np.ndindex(3, 8):
        delta = torch.zeros(3, 8, dtype=torch.float64)
        delta[place] = step
        up = by_method(name, teacher, start.double() + delta, temperature).sum()
        down = by_method(name, teacher, start.double() - delta, temperature).sum()
        numeric[place] = (up - down) / (2 * step)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), numeric, rtol=1e-5, atol=1e-6)


def test_forward_kl_gradient_is_student_minus_teacher() -> None:
    teacher, start = pair(3, 8)
    student = start.clone().requires_grad_()
    forward_kl(teacher, student).sum().backward()
    torch.testing.assert_close(student.grad, start.softmax(-1) - teacher.softmax(-1))


def test_jsd_over_its_weight_tends_to_forward_kl() -> None:
    teacher, student = pair(5, 20)
    forward = forward_kl(teacher, student)
    gaps = [
        ((generalized_jsd(teacher, student, weight) / weight - forward) / forward).abs().max()
        for weight in (1e-1, 1e-2, 1e-3)
    ]
    assert gaps[0] > 0.05
    assert gaps[2] < gaps[1] < gaps[0]
    assert gaps[2] < 5e-3
    swapped = generalized_jsd(teacher, student, 1 - 1e-3) / 1e-3
    torch.testing.assert_close(swapped, reverse_kl(teacher, student), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_the_ends_of_the_teacher_weight_are_refused(weight: float) -> None:
    with pytest.raises(UserError, match="teacher_weight"):
        generalized_jsd(*pair(2, 4), weight)


@each_function
@pytest.mark.parametrize("holder", ["teacher", "student", "both"])
def test_logits_of_minus_infinity_give_no_nan(name: str, holder: str) -> None:
    teacher, start = pair(4, 12)
    student = start.clone()
    for logits, role in ((teacher, "teacher"), (student, "student")):
        if holder in (role, "both"):
            logits[:, 9:] = -torch.inf
    student.requires_grad_()
    value = FUNCTIONS[name](teacher, student)
    value.sum().backward()
    assert student.grad is not None
    assert not value.isnan().any()
    assert not student.grad.isnan().any()
    if holder == "both":  # three tokens that nobody can say
        np.testing.assert_allclose(
            value.detach().numpy(),
            by_method(name, teacher[:, :9], start[:, :9]),
            rtol=1e-5,
            atol=1e-6,
        )
        assert (student.grad[:, 9:] == 0).all()


@each_function
def test_vocabularies_of_two_sizes_are_compared_on_the_common_part(name: str) -> None:
    teacher, student = pair(4, 12)
    function = FUNCTIONS[name]
    common = function(teacher[:, :10], student[:, :10])
    torch.testing.assert_close(function(teacher[:, :10], student), common)
    torch.testing.assert_close(function(teacher, student[:, :10]), common)


@each_function
def test_bfloat16_logits_are_compared_in_float32(name: str) -> None:
    teacher, student = (logits.bfloat16() for logits in pair(4, 50))
    value = FUNCTIONS[name](teacher, student)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.numpy(), by_method(name, teacher, student), atol=1e-6)


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([1e4, 0.0, -1e4])
    assert log_probs(logits).tolist() == [0.0, -1e4, -2e4]
    assert forward_kl(logits, torch.zeros(3)).item() == pytest.approx(math.log(3), rel=1e-6)
