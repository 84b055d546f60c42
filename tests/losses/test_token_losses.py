"""Losses of given tokens: their formulas, their gradients, and the same in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.losses.bounded import bounded_cross_entropy, bounded_divergence
from sdft_lightning.losses.divergence import (
    Divergence,
    PenalisedCrossEntropy,
    cross_entropy,
    probability_weighted,
)
from sdft_lightning.types import OutputHead

N, D, V = 9, 5, 23


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


TOKENS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
WEIGHTS = random(N, seed=4).abs()


def test_probability_weighted_is_p_times_cross_entropy_by_hand() -> None:
    log_probs = torch.tensor([[0.25, 0.75], [1.0, 0.0]]).log().clamp(min=-1e30)
    loss = probability_weighted(log_probs, log_probs, torch.tensor([0, 1]))
    assert loss.tolist() == pytest.approx([0.25 * 1.3862944, 0.0])  # p → 0 gives 0, not nan


def test_gradient_of_dft_is_p_times_that_of_cross_entropy_and_not_that_of_p_log_p() -> None:
    logits = random(N, V).requires_grad_()
    log_probs = logits.log_softmax(-1)
    (found,) = torch.autograd.grad(
        (WEIGHTS * probability_weighted(log_probs, log_probs, TOKENS)).sum(), logits
    )
    probs = logits.detach().softmax(-1)  # (N, V)
    of_target = probs.gather(-1, TOKENS[:, None])  # (N, 1)
    one_hot = torch.nn.functional.one_hot(TOKENS, V)
    torch.testing.assert_close(found, WEIGHTS[:, None] * of_target * (probs - one_hot))

    # Finite differences of sg[p] · CE, with p held at its value.
    def held(z: Tensor) -> Tensor:
        return (WEIGHTS * of_target[:, 0] * cross_entropy(z, z.log_softmax(-1), TOKENS)).sum()

    step = 1e-6
    for row, column in [(0, 0), (2, int(TOKENS[2])), (8, 22)]:
        nudge = torch.zeros(N, V, dtype=torch.float64)
        nudge[row, column] = step
        base = logits.detach()
        slope = (held(base + nudge) - held(base - nudge)) / (2 * step)
        assert float(found[row, column]) == pytest.approx(float(slope), abs=1e-8)


@pytest.mark.parametrize("tokens_a_chunk", [1, 4, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_bounded_dft_equals_its_formula_in_float64(tied: bool, tokens_a_chunk: int) -> None:
    weight, hidden = random(V, D, seed=1), random(N, D, seed=2)

    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
        head = weight.to(dtype).requires_grad_()
        if tied:  # the hidden states come from the same matrix: its gradient has two sources
            return head[TOKENS] * 0.5, head, [head]
        leaf = hidden.to(dtype).requires_grad_()
        return leaf, head, [leaf, head]

    states, head, leaves = inputs(torch.float32)
    loss, statistics = bounded_cross_entropy(
        states,
        OutputHead(head, None, 1.0, None),
        TOKENS,
        WEIGHTS.float(),
        tokens_a_chunk * V,
        probability_weighted,
    )
    found = torch.autograd.grad(loss, leaves)

    states, head, leaves = inputs(torch.float64)
    log_probs = (states @ head.T).log_softmax(-1)
    of_target = log_probs.gather(-1, TOKENS[:, None])[:, 0]  # (N,)
    plain = -(WEIGHTS * of_target.detach().exp() * of_target).sum()
    expected = torch.autograd.grad(plain, leaves)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        statistics.student_log_probs, of_target.detach().float(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_bounded_penalised_cross_entropy_equals_its_formula_in_float64(name: Any) -> None:
    weight, hidden, base = random(V, D, seed=1), random(N, D, seed=2), random(N, D, seed=5)

    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()

    states, head = inputs(torch.float32)
    output = OutputHead(head, None, 1.0, None)
    penalised = PenalisedCrossEntropy(0.3, Divergence(name))
    loss, statistics = bounded_divergence(
        base.float(), output, states, output, TOKENS, WEIGHTS.float(), penalised, 1.0, 2 * V
    )
    found = torch.autograd.grad(loss, [states, head])

    states, head = inputs(torch.float64)
    log_q = (states @ head.T).log_softmax(-1)  # (N, V)
    log_p = (base @ head.T).log_softmax(-1).detach()
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    targets = -log_q.gather(-1, TOKENS[:, None])[:, 0]
    penalty = forward if name == "forward_kl" else reverse
    plain = (WEIGHTS * (targets + 0.3 * penalty)).sum()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for got, wanted in zip(found, torch.autograd.grad(plain, [states, head]), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    # Logged apart, whatever the sum: KL(base ‖ student) and log Q of the target.
    torch.testing.assert_close(statistics.kl.double(), forward.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        -statistics.student_log_probs, targets.detach().float(), rtol=1e-5, atol=1e-6
    )
