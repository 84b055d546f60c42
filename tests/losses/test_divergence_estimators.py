"""The named estimators, topk and sampled_token, by hand; and the options that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import (
    Divergence,
    forward_kl,
    generalized_jsd,
    log_probs,
    reverse_kl,
    sampled_token,
    topk,
)
from sdft_lightning.types import OutputHead

TEACHER = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
STUDENT = torch.tensor([0.1, 0.2, 0.2, 0.5]).log()


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def top(k: int, support: Any, tail_bucket: bool, name: Any = "forward_kl") -> Divergence:
    weight = 0.3 if name == "generalized_jsd" else None
    return Divergence(name, weight, "topk", k, support, tail_bucket)


def kl(first: list[float], second: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(first, second, strict=True))


def test_topk_without_tail_renormalises_on_the_teachers_tokens() -> None:
    value = topk(TEACHER, STUDENT, top(2, "teacher", False)).item()  # tokens 0 and 1
    assert value == pytest.approx(kl([4 / 7, 3 / 7], [1 / 3, 2 / 3]), abs=1e-6)


def test_topk_with_tail_counts_the_rest_as_one_token() -> None:
    value = topk(TEACHER, STUDENT, top(2, "teacher", True)).item()
    assert value == pytest.approx(kl([0.4, 0.3, 0.3], [0.1, 0.2, 0.7]), abs=1e-6)


def test_topk_on_the_students_support_takes_other_tokens() -> None:
    value = topk(TEACHER, STUDENT, top(1, "student", True)).item()  # token 3
    assert value == pytest.approx(kl([0.1, 0.9], [0.5, 0.5]), abs=1e-6)
    reverse = topk(TEACHER, STUDENT, top(1, "student", True, "reverse_kl")).item()
    assert reverse == pytest.approx(kl([0.5, 0.5], [0.1, 0.9]), abs=1e-6)


def test_topk_jsd_with_tail_by_hand() -> None:
    value = topk(TEACHER, STUDENT, top(1, "teacher", True, "generalized_jsd")).item()  # token 0
    p, q, mixture = [0.4, 0.6], [0.1, 0.9], [0.19, 0.81]
    assert value == pytest.approx(0.3 * kl(p, mixture) + 0.7 * kl(q, mixture), abs=1e-6)


@pytest.mark.parametrize("k", [30, 31, 500])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_k_of_the_whole_vocabulary_is_exact(k: int, tail: bool, support: str, name: Any) -> None:
    teacher, start = pair(5, 30)
    results = []
    for estimator in (
        Divergence(name, 0.3 if "jsd" in name else None),
        top(k, support, tail, name),
    ):
        student = start.clone().requires_grad_()
        value = estimator(log_probs(teacher), log_probs(student), torch.zeros(5).long())
        value.sum().backward()
        results.append((value.detach(), student.grad))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=2e-6)


def test_topk_with_tail_is_a_lower_bound_of_the_exact_divergence() -> None:
    teacher, student = pair(20, 50)
    exact = forward_kl(teacher, student)
    values = [topk(teacher, student, top(k, "teacher", True)) for k in (1, 5, 20, 50)]
    for less, more in zip(values, [*values[1:], exact], strict=True):
        assert (less <= more + 1e-6).all()
    assert (values[0] < exact - 1e-3).all()


def test_topk_takes_the_temperature_and_two_vocabularies() -> None:
    teacher, student = pair(4, 12)
    divergence = top(3, "student", True)
    torch.testing.assert_close(
        topk(teacher[:, :10], student, divergence, 2.0),
        topk(teacher[:, :10] / 2, student[:, :10] / 2, divergence),
    )


def test_topk_gradient_survives_a_tail_without_mass() -> None:
    teacher = torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[60.0, 0.0, 0.0, 0.0]], requires_grad=True)
    topk(teacher, student, top(1, "teacher", True)).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def sure_pair() -> tuple[Tensor, Tensor]:
    """A student that is sure of token 0, and a teacher that is not; in float64."""
    teacher, student = torch.zeros(2, 1000, dtype=torch.float64)
    teacher[0], teacher[5] = 8.0, 9.0
    student[:3] = torch.tensor([27.0, 5.0, 4.0])
    return teacher, student


def exact_with_tail(teacher: Tensor, student: Tensor, support: list[int], name: str) -> Tensor:
    """The divergence of a support and its tail, in float64 from the logits themselves."""
    inside = torch.zeros(teacher.shape[-1], dtype=torch.bool)
    inside[support] = True
    p, q = (
        torch.cat([each[support], each[~inside].logsumexp(-1, keepdim=True)]) - each.logsumexp(-1)
        for each in (teacher, student)
    )
    if name == "generalized_jsd":
        mixture = torch.log(0.3 * p.exp() + 0.7 * q.exp())
        return 0.3 * (p.exp() * (p - mixture)).sum() + 0.7 * (q.exp() * (q - mixture)).sum()
    first, second = (p, q) if name == "forward_kl" else (q, p)
    return (first.exp() * (first - second)).sum()


def finite_difference(teacher: Tensor, student: Tensor, support: list[int], name: str) -> Tensor:
    step, found = 1e-5, torch.zeros_like(student)
    for place in range(12):  # the others are alike
        change = torch.zeros_like(student)
        change[place] = step
        above, below = (
            exact_with_tail(teacher, student + sign * change, support, name) for sign in (1, -1)
        )
        found[place] = (above - below) / (2 * step)
    found[12:] = found[11]
    return found


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize("sure", ["student", "teacher"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_tail_keeps_its_value_and_gradient_where_one_side_is_sure(
    name: Any, sure: str, support: str, bounded: bool
) -> None:
    teacher, student = sure_pair() if sure == "student" else reversed(sure_pair())
    chosen = (teacher if support == "teacher" else student).topk(3).indices.tolist()
    value = exact_with_tail(teacher, student, chosen, name)
    gradient = finite_difference(teacher, student, chosen, name)
    z = student.float().unsqueeze(0).requires_grad_()  # (1, V)
    divergence = top(3, support, True, name)
    if bounded:  # the logits are the hidden states of a head that changes nothing
        head = OutputHead(torch.eye(1000), None, 1.0, None)
        found, _ = bounded_divergence(
            teacher.float().unsqueeze(0),
            head,
            z,
            head,
            torch.zeros(1).long(),
            torch.ones(1),
            divergence,
        )
    else:
        found = topk(teacher.float().unsqueeze(0), z, divergence).sum()
    found.backward()
    assert z.grad is not None
    assert found.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(z.grad[0].double(), gradient, rtol=2e-5, atol=2e-7)


def test_tail_of_a_sure_student_is_that_of_float64() -> None:
    teacher, student = sure_pair()
    z = student.float().requires_grad_()
    value = topk(teacher.float(), z, top(3, "student", True))
    value.backward()
    assert z.grad is not None
    assert value.item() == pytest.approx(14.58, abs=0.005)
    assert z.grad.norm().item() == pytest.approx(0.754, abs=0.0005)


def test_sampled_token_is_the_log_ratio_at_the_token() -> None:
    value = sampled_token(TEACHER, STUDENT, torch.tensor(3)).item()
    assert value == pytest.approx(math.log(0.5) - math.log(0.1), abs=1e-6)
    assert sampled_token(TEACHER, STUDENT, torch.tensor(0)).item() < 0  # single samples may be


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sampled_token_on_average_has_value_and_gradient_of_reverse_kl(temperature: float) -> None:
    teacher, start = (logits.squeeze(0) for logits in pair(1, 15))
    chances = (start / temperature).softmax(-1)
    student = start.clone().requires_grad_()
    tokens = torch.arange(15)
    rows = sampled_token(
        teacher.expand(15, 15), student.expand(15, 15), tokens, temperature
    )  # every token once
    (rows * chances).sum().backward()
    exact = start.clone().requires_grad_()
    value = reverse_kl(teacher, exact, temperature)
    value.backward()
    assert (rows.detach() * chances).sum().item() == pytest.approx(value.item(), abs=1e-6)
    torch.testing.assert_close(student.grad, exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "exact"),
    [
        ("forward_kl", {}, forward_kl),
        ("reverse_kl", {}, reverse_kl),
        (
            "generalized_jsd",
            {"teacher_weight": 0.3},
            lambda teacher, student: generalized_jsd(teacher, student, 0.3),
        ),
    ],
)
def test_a_divergence_is_chosen_by_its_name(name: Any, options: dict[str, Any], exact: Any) -> None:
    teacher, student = pair(4, 12)
    value = Divergence(name, **options)(
        log_probs(teacher), log_probs(student), torch.zeros(4).long()
    )
    torch.testing.assert_close(value, exact(teacher, student))


def test_the_default_is_the_papers_exact_forward_kl() -> None:
    assert Divergence() == Divergence("forward_kl", None, "full_vocabulary", None, None, None)


TOPK = {"estimator": "topk", "k": 4, "support": "student", "tail_bucket": True}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "kl"}, "divergence.name"),
        ({"estimator": "top_k"}, "divergence.estimator"),
        ({"name": "generalized_jsd"}, "teacher_weight"),
        ({"name": "generalized_jsd", "teacher_weight": 0.0}, "teacher_weight"),
        ({"name": "generalized_jsd", "teacher_weight": 1.0}, "teacher_weight"),
        ({"name": "forward_kl", "teacher_weight": 0.5}, "divergence.teacher_weight"),
        ({"name": "reverse_kl", "teacher_weight": 0.5}, "divergence.teacher_weight"),
        ({**TOPK, "k": None}, "divergence.k"),
        ({**TOPK, "k": 0}, "divergence.k"),
        ({**TOPK, "support": None}, "divergence.support"),
        ({**TOPK, "support": "both"}, "divergence.support"),
        ({**TOPK, "tail_bucket": None}, "divergence.tail_bucket"),
        ({"k": 4}, "divergence.k"),
        ({"support": "student"}, "support"),
        ({"tail_bucket": False}, "tail_bucket"),
        ({"name": "reverse_kl", "estimator": "sampled_token", "k": 4}, "divergence.k"),
        ({"estimator": "sampled_token"}, "divergence.estimator"),
        (
            {"name": "generalized_jsd", "teacher_weight": 0.5, "estimator": "sampled_token"},
            "divergence.estimator",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused_by_name(
    options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        Divergence(**options)


def test_topk_by_function_refuses_another_estimator() -> None:
    with pytest.raises(UserError, match=r"divergence\.estimator"):
        topk(TEACHER, STUDENT, Divergence())
