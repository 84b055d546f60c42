"""bfloat16 on a processor that does not multiply it: float32 products, whatever computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sdft_lightning.forward.hidden import apply_head, completion_hidden_states
from sdft_lightning.forward.scoring import score_continuations
from sdft_lightning.losses.bounded import bounded_divergence, cast_side
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.models import precision
from sdft_lightning.models.precision import product_dtype, without_slow_autocast
from sdft_lightning.teacher import FrozenTeacher
from sdft_lightning.types import OutputHead, ScoringBatch, Tokens


@pytest.mark.parametrize(
    ("asked", "device", "found"),
    [
        (torch.bfloat16, "cpu", torch.float32),
        (torch.bfloat16, "cuda", torch.bfloat16),
        (torch.float16, "cpu", torch.float16),
        (torch.float32, "cpu", torch.float32),
    ],
)
def test_only_bfloat16_on_such_a_processor_is_multiplied_in_another_dtype(
    no_bfloat16_products: None, asked: torch.dtype, device: str, found: torch.dtype
) -> None:
    assert product_dtype(asked, device) == found


def test_where_bfloat16_is_multiplied_nothing_changes(bfloat16_products: None) -> None:
    assert product_dtype(torch.bfloat16) == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), without_slow_autocast(nn.Linear(2, 2)):
        assert torch.is_autocast_enabled("cpu")


def test_autocast_is_kept_where_it_brings_dtypes_together(no_bfloat16_products: None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16), without_slow_autocast(model):
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16


def test_torch_without_onednn_does_not_multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)  # of such a build there is no operator
    assert not precision.multiplies_bfloat16()


@pytest.mark.parametrize(
    ("dtype", "enabled", "left"),
    [(torch.bfloat16, True, False), (torch.float16, True, True), (torch.bfloat16, False, False)],
)
def test_autocast_is_left_where_it_is_slow_and_entered_again(
    no_bfloat16_products: None, dtype: torch.dtype, enabled: bool, left: bool
) -> None:
    with torch.autocast("cpu", dtype, enabled=enabled):
        with without_slow_autocast(nn.Linear(2, 2)):
            assert torch.is_autocast_enabled("cpu") is left
            assert not left or torch.get_autocast_dtype("cpu") == dtype
        assert torch.is_autocast_enabled("cpu") is enabled


def test_a_model_that_is_not_fused_is_computed_in_float32(
    model: Any, either_processor: bool
) -> None:
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    arguments = (model, Tokens(ids, mask), Tokens(ids, mask), mask)
    exact = completion_hidden_states(*arguments, fuse=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = completion_hidden_states(*arguments, fuse=False)
    assert torch.equal(found, exact) is not either_processor


def test_a_cached_teacher_answers_in_float32(model: Any, either_processor: bool) -> None:
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    found = []
    for enabled in (False, True):
        teacher = FrozenTeacher(cache_prompts=True)
        teacher.copy_from(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(teacher(Tokens(ids, mask), Tokens(ids, mask), mask))
    assert torch.equal(*found) is not either_processor


def test_benchmarks_are_scored_in_float32(model: Any, either_processor: bool) -> None:
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = ScoringBatch(ids, mask, ids, mask, torch.arange(3), [0, 1, 2])
    exact = score_continuations(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = score_continuations(model, batch)
    assert (found == exact) is not either_processor


def test_logits_of_the_loss_are_float32(either_processor: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 12, 16, generator=draw)
    head = OutputHead(torch.randn(50, 16, generator=draw), None, 1.0, None)
    ids = torch.randint(50, (12,), generator=draw)
    weights = torch.full((12,), 1 / 12)
    losses = []
    for enabled in (False, True):
        given = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = bounded_divergence(
                teacher, head, given, head, ids, weights, Divergence(), 1.0, 4 * 50
            )
        loss.backward()
        losses.append((loss.detach(), given.grad))
    for found, exact in zip(*losses, strict=True):
        assert torch.equal(found, exact) is not either_processor


def test_a_head_in_bfloat16_is_multiplied_in_float32(either_processor: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 16, generator=draw)
    weight = torch.randn(50, 16, generator=draw).bfloat16()
    head = OutputHead(weight, None, 1.0, None)
    exact = hidden @ weight.float().T
    for found in (cast_side(hidden, head, 50).raw(slice(0, 12)), apply_head(head, hidden)):
        assert torch.equal(found.float(), exact) is not either_processor
