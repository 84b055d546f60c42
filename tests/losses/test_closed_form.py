"""Gradients that are written down equal those of autograd, with the same statistics."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.losses import bounded
from sdft_lightning.losses.bounded import _chunk_tokens, bounded_cross_entropy, bounded_divergence
from sdft_lightning.losses.closed_form import closed_form
from sdft_lightning.losses.divergence import Divergence, cross_entropy, probability_weighted
from sdft_lightning.types import OutputHead

N, V, D = 7, 50, 8


@pytest.mark.parametrize(
    ("loss", "known"),
    [
        (Divergence(), True),
        (cross_entropy, True),
        (Divergence("reverse_kl"), False),
        (Divergence("generalized_jsd", teacher_weight=0.5), False),
        (Divergence(estimator="topk", k=3, support="teacher", tail_bucket=True), False),
        (probability_weighted, False),
    ],
)
def test_only_these_losses_have_a_known_gradient(loss: Any, known: bool) -> None:
    assert (closed_form(loss) is not None) is known


def drawn(random: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random).to(dtype)


def both_ways(
    monkeypatch: pytest.MonkeyPatch,
    loss: Any,
    dtype: torch.dtype,
    scale: float,
    t: float,
    pieces: int = 2,
) -> list[list[Tensor]]:
    found = []
    # Chunks of 3 are walked over in two pieces.
    monkeypatch.setattr(bounded, "PIECE_ELEMENTS", {"cpu": pieces * V, "cuda": 0})
    for autograd in (False, True):
        if autograd:
            monkeypatch.setattr(bounded, "closed_form", lambda _: None)
        random = torch.Generator().manual_seed(0)
        draw = partial(drawn, random, dtype)
        hidden, weight, bias = (draw(*shape).requires_grad_() for shape in ((N, D), (V, D), (V,)))
        ids, weights = torch.randint(0, V, (N,), generator=random), torch.rand(N, generator=random)
        with torch.no_grad():
            bias[:3] = -torch.inf  # a padded vocabulary
        ids = ids.clamp(min=3)
        head = OutputHead(weight, bias, scale, None)
        if loss is cross_entropy:
            value, statistics = bounded_cross_entropy(hidden, head, ids, weights, 3 * V)
        else:
            teacher = OutputHead(draw(V, D), bias.detach(), scale, None)
            value, statistics = bounded_divergence(
                draw(N, D), teacher, hidden, head, ids, weights, loss, t, 3 * V
            )
        value.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        assert bias.grad is not None
        found.append([value, *statistics, hidden.grad, weight.grad, bias.grad])
    return found


@pytest.mark.parametrize("loss", [Divergence(), cross_entropy], ids=["forward_kl", "cross_entropy"])
@pytest.mark.parametrize(("scale", "t"), [(1.0, 1.0), (0.5, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_statistics_and_gradients_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, loss: Any, dtype: torch.dtype, scale: float, t: float
) -> None:
    mine, plain = both_ways(monkeypatch, loss, dtype, scale, t)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, wanted in zip(mine, plain, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert any(gradient.abs().max() > 0.01 for gradient in mine[-3:])


@pytest.mark.parametrize("loss", [Divergence(), cross_entropy], ids=["forward_kl", "cross_entropy"])
def test_pieces_of_one_token_and_of_a_whole_chunk_give_the_same(
    monkeypatch: pytest.MonkeyPatch, loss: Any
) -> None:
    one, whole = (
        both_ways(monkeypatch, loss, torch.float32, 0.5, 0.7, pieces)[0] for pieces in (1, 100)
    )
    for got, wanted in zip(one, whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_a_gpu_walks_over_hundreds_of_tokens_of_a_large_vocabulary_at_once() -> None:
    vocabulary = 152_064
    assert bounded.by_device(bounded.PIECE_ELEMENTS, "cpu") == 2**18
    for device in ("cuda", "mps"):
        assert 300 < bounded.by_device(bounded.PIECE_ELEMENTS, device) // vocabulary < 1000
    head = OutputHead(torch.empty(vocabulary, 1, device="meta"), None, 1.0, None)
    for loss, least in ((Divergence(), 300), (Divergence("reverse_kl"), 200)):
        assert least < _chunk_tokens(None, vocabulary, loss, head) <= 512
