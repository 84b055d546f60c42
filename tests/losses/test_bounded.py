"""The bounded-memory loss against the plain one: values, gradients and statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import Divergence, log_probs
from sdft_lightning.types import OutputHead, TokenStatistics

N, D, V = 11, 6, 40
DIVERGENCES = {
    "forward_kl": Divergence(),
    "reverse_kl": Divergence("reverse_kl"),
    "generalized_jsd": Divergence("generalized_jsd", 0.3),
    "topk": Divergence("forward_kl", None, "topk", 5, "teacher", True),
    "sampled_token": Divergence("reverse_kl", None, "sampled_token"),
}
HEADS = ["plain", "tied", "biased", "softcap", "scale", "student_longer", "teacher_longer"]


class Case(NamedTuple):
    teacher_hidden: Tensor
    teacher_head: OutputHead
    hidden: Tensor
    head: OutputHead
    token_ids: Tensor
    token_weights: Tensor

    def arguments(self) -> tuple[Any, ...]:
        return tuple(self)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.head.weight, self.head.bias) if t is not None]


def make_case(kind: str = "plain") -> Case:
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def head(rows: int) -> OutputHead:
        return OutputHead(
            random(rows, D).requires_grad_(),
            random(rows).requires_grad_() if kind in ("biased", "softcap", "scale") else None,
            0.25 if kind in ("scale", "softcap") else 1.0,
            1.5 if kind == "softcap" else None,
        )

    mine, theirs = V + 7 * (kind == "student_longer"), V + 7 * (kind == "teacher_longer")
    token_weights = torch.rand(N, generator=generator)
    token_weights[3] = 0.0
    return Case(
        random(N, D),
        head(theirs),
        random(N, D).requires_grad_(),
        head(mine),
        torch.randint(0, V, (N,), generator=generator),
        token_weights,
    )


def logits(hidden: Tensor, head: OutputHead) -> Tensor:
    values = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)) * head.scale
    return values if head.softcap is None else head.softcap * torch.tanh(values / head.softcap)


def both_log_probs(case: Case, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    teacher = logits(case.teacher_hidden, case.teacher_head)[:, :V].detach()
    student = logits(case.hidden, case.head)[:, :V]
    return log_probs(teacher, temperature), log_probs(student, temperature)


def plain_loss(case: Case, divergence: Divergence, temperature: float = 1.0) -> Tensor:
    per_token = divergence(*both_log_probs(case, temperature), case.token_ids)
    return (per_token * case.token_weights).sum()


def gradients(case: Case, loss: Tensor) -> list[Tensor]:
    return [grad.clone() for grad in torch.autograd.grad(loss, case.leaves())]


def assert_same(mine: Tensor, plain: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the greatest element: a sum over tokens may cancel in single ones."""
    torch.testing.assert_close(mine, plain, rtol=0, atol=tolerance * float(plain.abs().max()))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", list(DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradients_equal_the_plain_form(kind: str, name: str, temperature: float) -> None:
    case = make_case(kind)
    if kind == "tied":  # the embedding is the head: its gradient has two sources
        embedded = case.head.weight[case.token_ids] * 0.5
        case = case._replace(hidden=embedded)
    divergence = DIVERGENCES[name]
    mine, _ = bounded_divergence(*case.arguments(), divergence, temperature, chunk_elements=3 * V)
    plain = plain_loss(case, divergence, temperature)
    assert mine.dtype == torch.float32
    assert mine.item() == pytest.approx(plain.item(), rel=1e-5)
    leaves = case.leaves()[1:] if kind == "tied" else case.leaves()
    expected = torch.autograd.grad(plain, leaves, retain_graph=True)
    for got, wanted in zip(torch.autograd.grad(mine, leaves), expected, strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize("tokens_a_chunk", [0, 1, 2, 4, 10, 11, 12, 1000])
def test_every_chunk_size_gives_the_same(tokens_a_chunk: int) -> None:
    case = make_case("biased")
    mine, statistics = bounded_divergence(
        *case.arguments(), Divergence(), chunk_elements=tokens_a_chunk * V
    )
    whole, expected = bounded_divergence(*case.arguments(), Divergence())
    assert mine.item() == pytest.approx(whole.item(), rel=1e-6)
    for got, wanted in zip(statistics, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(gradients(case, mine), gradients(case, whole), strict=True):
        assert_same(got, wanted, 1e-6)


def direct_statistics(case: Case, divergence: Divergence, temperature: float) -> TokenStatistics:
    teacher, student = (t.detach() for t in both_log_probs(case, temperature))
    rows = torch.arange(N)
    return TokenStatistics(
        divergence(teacher, student, case.token_ids),
        (teacher.exp() * (teacher - student)).sum(-1),
        -(student.exp() * student).sum(-1),
        -(teacher.exp() * teacher).sum(-1),
        (teacher.argmax(-1) == student.argmax(-1)).float(),
        student[rows, case.token_ids],
        teacher[rows, case.token_ids],
    )


@pytest.mark.parametrize("kind", ["softcap", "student_longer"])
def test_statistics_equal_their_formulas(kind: str) -> None:
    case = make_case(kind)
    divergence = DIVERGENCES["reverse_kl"]
    _, statistics = bounded_divergence(*case.arguments(), divergence, 0.8, chunk_elements=4 * V)
    expected = direct_statistics(case, divergence, 0.8)
    for name, got, wanted in zip(TokenStatistics._fields, statistics, expected, strict=True):
        assert got.dtype == torch.float32, name
        assert not got.requires_grad, name
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6, msg=name)


def test_top1_agreement_is_one_for_a_teacher_that_is_the_student() -> None:
    case = make_case()
    case = case._replace(teacher_hidden=case.hidden.detach(), teacher_head=case.head)
    loss, statistics = bounded_divergence(*case.arguments(), Divergence())
    assert loss.abs().item() < 1e-6
    assert statistics.top1_agreement.tolist() == [1.0] * N
    apart = case._replace(teacher_hidden=-case.hidden.detach())
    assert bounded_divergence(*apart.arguments(), Divergence())[1].top1_agreement.sum() == 0


def test_no_gradient_is_formed_under_no_grad() -> None:
    case = make_case("biased")
    with torch.no_grad():
        mine, statistics = bounded_divergence(*case.arguments(), Divergence())
    assert not mine.requires_grad
    assert mine.item() == pytest.approx(plain_loss(case, Divergence()).item(), rel=1e-5)
    assert statistics.kl.shape == (N,)
    with torch.inference_mode():
        assert not bounded_divergence(*case.arguments(), Divergence())[0].requires_grad


def test_no_gradient_flows_to_the_teacher() -> None:
    case = make_case("biased")
    teacher_hidden = case.teacher_hidden.clone().requires_grad_()
    case = case._replace(teacher_hidden=teacher_hidden)
    bounded_divergence(*case.arguments(), Divergence())[0].backward()
    assert teacher_hidden.grad is None
    assert case.teacher_head.weight.grad is None
    assert case.head.weight.grad is not None


def test_a_factor_behind_the_loss_scales_the_gradients() -> None:
    case = make_case("biased")
    once = gradients(case, bounded_divergence(*case.arguments(), Divergence())[0])
    thrice = gradients(case, bounded_divergence(*case.arguments(), Divergence())[0] * 3)
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, one * 3, rtol=1e-6, atol=0)


def test_gradients_of_two_losses_accumulate() -> None:
    case = make_case()
    for _ in range(2):
        bounded_divergence(*case.arguments(), Divergence())[0].backward()
    once = torch.autograd.grad(plain_loss(case, Divergence()), [case.head.weight])[0]
    assert case.head.weight.grad is not None
    assert_same(case.head.weight.grad, 2 * once)


def test_a_second_backward_is_an_error_and_not_a_missing_gradient() -> None:
    case = make_case()
    loss, _ = bounded_divergence(*case.arguments(), Divergence())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_a_frozen_head_gets_no_weight_gradient() -> None:
    case = make_case("biased")
    assert case.head.bias is not None
    frozen = case.head._replace(weight=case.head.weight.detach(), bias=case.head.bias.detach())
    frozen_case = case._replace(head=frozen)
    loss, _ = bounded_divergence(*frozen_case.arguments(), Divergence())
    loss.backward()
    assert frozen.weight.grad is None
    assert case.hidden.grad is not None
    (wanted,) = torch.autograd.grad(plain_loss(case, Divergence()), [case.hidden])
    assert_same(case.hidden.grad, wanted)


def test_a_trained_head_on_frozen_hidden_states_gets_its_gradient() -> None:
    case = make_case()
    case = case._replace(hidden=case.hidden.detach())
    bounded_divergence(*case.arguments(), Divergence())[0].backward()
    (wanted,) = torch.autograd.grad(plain_loss(case, Divergence()), [case.head.weight])
    assert case.head.weight.grad is not None
    assert_same(case.head.weight.grad, wanted)


def test_no_kept_token_gives_loss_zero_and_zero_gradients() -> None:
    case = make_case("biased")
    none = Case(
        case.teacher_hidden[:0],
        case.teacher_head,
        case.hidden[:0],
        case.head,
        case.token_ids[:0],
        case.token_weights[:0],
    )
    loss, statistics = bounded_divergence(*none.arguments(), Divergence())
    loss.backward()
    assert loss.item() == 0.0
    assert statistics.kl.shape == (0,)
    assert case.head.weight.grad is not None
    assert (case.head.weight.grad == 0).all()
