"""The bounded-memory loss in bfloat16, with logits of -inf, and as cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sdft_lightning.losses.bounded import bounded_cross_entropy, bounded_divergence
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.types import OutputHead

N, D, V = 13, 16, 50


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(V, D, generator=generator)).to(dtype).requires_grad_()
    teacher_hidden = torch.randn(N, D, generator=generator).to(dtype)
    token_ids = torch.randint(0, V, (N,), generator=generator)
    return hidden, weight, teacher_hidden, token_ids, torch.rand(N, generator=generator)


def divergence_loss(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of the hidden states and of the weight."""
    hidden, weight, teacher_hidden, token_ids, token_weights = tensors(dtype)
    head = OutputHead(weight, None, 1.0, None)
    loss, _ = bounded_divergence(
        teacher_hidden, head, hidden, head, token_ids, token_weights, Divergence(), 1.0, 4 * V
    )
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def test_autocast_to_bfloat16_stays_close_to_float32(bfloat16_products: None) -> None:
    exact = divergence_loss()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = divergence_loss()
    assert mixed[0].item() != exact[0].item()  # bfloat16 products were really used
    for got, wanted in zip(mixed, exact, strict=True):
        assert got.dtype == torch.float32
        gap = (got - wanted).norm() / wanted.norm()
        assert gap < 2e-2


@pytest.mark.parametrize("weight", [1 / 16, 1 / 4096, 1 / 32_768])
def test_float16_does_not_round_small_token_weights_to_zero(weight: float) -> None:
    # 1 / 32,768 is the weight of a token where 32 completions have 1024 tokens each.
    hidden, _, teacher_hidden, token_ids, _ = tensors()
    generator = torch.Generator().manual_seed(8)
    head_weight = 0.1 * torch.randn(5000, D, generator=generator)  # no token stands out
    head = OutputHead(head_weight.requires_grad_(), None, 1.0, None)
    token_weights = torch.full((N,), weight)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            loss, _ = bounded_divergence(
                teacher_hidden, head, hidden, head, token_ids, token_weights, Divergence()
            )
        scaled = loss * 65_536  # as the gradient scaler of `precision: 16-mixed` does
        gradients.append(torch.autograd.grad(scaled, [hidden, head_weight]))
    for exact, mixed in zip(*gradients, strict=True):
        assert (mixed - exact).norm() / exact.norm() < 2e-2


def test_bfloat16_weights_get_bfloat16_gradients_near_the_exact_ones() -> None:
    exact = divergence_loss()
    low = divergence_loss(torch.bfloat16)
    assert [got.dtype for got in low] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for got, wanted in zip(low, exact, strict=True):
        assert (got.float() - wanted).norm() / wanted.norm() < 3e-2


def test_a_float32_teacher_beside_a_bfloat16_student() -> None:
    hidden, weight, teacher_hidden, token_ids, token_weights = tensors()
    head = OutputHead(weight.detach().bfloat16().requires_grad_(), None, 1.0, None)
    teacher_head = OutputHead(weight.detach(), None, 1.0, None)
    student = hidden.detach().bfloat16().requires_grad_()
    loss, _ = bounded_divergence(
        teacher_hidden, teacher_head, student, head, token_ids, token_weights, Divergence()
    )
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(divergence_loss()[0].item(), rel=2e-2)


def test_a_bias_of_minus_infinity_gives_no_nan() -> None:
    hidden, weight, teacher_hidden, token_ids, token_weights = tensors()
    bias = torch.zeros(V)
    bias[45:] = -torch.inf  # padding of the vocabulary
    head = OutputHead(weight, bias.requires_grad_(), 1.0, None)
    loss, statistics = bounded_divergence(
        teacher_hidden, head, hidden, head, token_ids.clamp(max=44), token_weights, Divergence()
    )
    loss.backward()
    short = OutputHead(weight[:45].detach(), None, 1.0, None)
    expected, _ = bounded_divergence(
        teacher_hidden, short, hidden, short, token_ids.clamp(max=44), token_weights, Divergence()
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for grad in (hidden.grad, weight.grad, bias.grad):
        assert grad is not None
        assert grad.isfinite().all()
    for values in statistics:
        assert values.isfinite().all()


@pytest.mark.parametrize("tokens_a_chunk", [1, 5, 100])
def test_cross_entropy_equals_that_of_torch(tokens_a_chunk: int) -> None:
    hidden, weight, _, token_ids, token_weights = tensors()
    bias = torch.linspace(-1, 1, V).requires_grad_()
    head = OutputHead(weight, bias, 0.5, None)
    mine, statistics = bounded_cross_entropy(
        hidden, head, token_ids, token_weights, tokens_a_chunk * V
    )
    logits = (hidden @ weight.T + bias) * 0.5
    per_token = cross_entropy(logits, token_ids, reduction="none")
    plain = (per_token * token_weights).sum()
    assert mine.item() == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(statistics.divergence, per_token.detach())
    torch.testing.assert_close(statistics.student_log_probs, -per_token.detach())
    assert statistics.kl.abs().max() < 1e-6
    leaves = [hidden, weight, bias]
    wanted = torch.autograd.grad(plain, leaves)
    for got, other in zip(torch.autograd.grad(mine, leaves), wanted, strict=True):
        torch.testing.assert_close(got, other, rtol=0, atol=1e-5 * float(other.abs().max()))
