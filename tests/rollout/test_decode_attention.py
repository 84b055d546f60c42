"""Attention of a single query: the formula against torch's kernel, and where it is used."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sdft_lightning.forward.kv_cache import cache_argument, cache_of
from sdft_lightning.rollout import Sampling, decode_mode, generate_rollout
from sdft_lightning.rollout.decode_mode import decode_attention as single_queries
from sdft_lightning.rollout.decode_mode import single_query
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import Tokens


def inputs(keys: int = 7, heads: int = 6, shared: int = 2) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, 1, 8, generator=draw)
    key = torch.randn(3, shared, keys, 8, generator=draw)
    value = torch.randn(3, shared, keys, 4, generator=draw)
    return query, key, value


@pytest.mark.parametrize("kind", ["none", "bool", "added", "longer"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_single_query_is_what_the_kernel_computes(kind: str, scaling: float | None) -> None:
    query, key, value = inputs()
    seen = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    seen[1, :, :, :4] = False
    mask: torch.Tensor | None = {"none": None}.get(kind, seen)
    if kind == "added":
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    ).transpose(1, 2)
    if kind == "longer":  # of a cache that has room behind its keys
        mask = torch.cat([seen, torch.ones(3, 1, 1, 5, dtype=torch.bool)], dim=-1)
    found = single_query(query, key, value, mask, scaling)
    torch.testing.assert_close(found, wanted)


def test_bfloat16_is_as_near_to_float64_as_the_kernel() -> None:
    query, key, value = (each.bfloat16() for each in inputs(keys=200))
    exact = single_query(query.double(), key.double(), value.double(), None)
    kernel = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, enable_gqa=True
    ).transpose(1, 2)
    found = single_query(query, key, value, None)
    assert found.dtype == torch.bfloat16
    error, of_kernel = ((each.double() - exact).abs().max() for each in (found, kernel))
    assert error <= 1.5 * of_kernel


@pytest.mark.parametrize(
    ("dtype", "attention", "used"),
    [("bfloat16", "sdpa", True), ("float32", "sdpa", False), ("bfloat16", "eager", False)],
)
def test_it_is_used_in_bfloat16_for_new_tokens_only_and_the_kernel_comes_back(
    dtype: str,
    attention: str,
    used: bool,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    bfloat16_products: None,
) -> None:
    calls: list[tuple[int, int]] = []

    def counted(query: Any, key: Any, *rest: Any) -> Any:
        calls.append((query.shape[2], key.shape[2]))
        return single_query(query, key, *rest)

    monkeypatch.setattr(decode_mode, "single_query", counted)
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model = model.to(getattr(torch, dtype))
    model.set_attn_implementation(attention)
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    sampling = Sampling(max_new_tokens=4)
    numbers = row_uniforms(0, 0, ["a", "b"], 1, 4)
    rollout = generate_rollout(model, Tokens(ids, mask), sampling, numbers, [271], 0)
    layers = model.config.num_hidden_layers
    new = rollout.completion_ids.shape[1]
    assert calls == [(1, 3 + step) for step in range(1, new) for _ in range(layers) if used]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is kernel


def test_kernel_comes_back_after_an_error(model: Any) -> None:
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def fail() -> None:
        with single_queries(model.bfloat16()):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not kernel
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is kernel


def test_next_token_is_as_likely_as_by_the_kernel_but_for_rounding(model: Any) -> None:
    model = model.bfloat16()
    ids = torch.randint(5, 200, (12, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::3, :4] = 0
    places = mask.cumsum(dim=1).sub(1).clamp(min=0)

    def next_log_probs(dtype: torch.dtype, ours: bool) -> torch.Tensor:
        copy = model.to(dtype)
        with torch.inference_mode(), single_queries(copy) if ours else nullcontext():
            read = copy(
                input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=places[:, :-1]
            )
            found = copy(
                input_ids=ids[:, -1:],
                attention_mask=mask,
                position_ids=places[:, -1:],
                **cache_argument(copy, cache_of(read)),
            )
        return found.logits[:, -1].float().log_softmax(-1)

    ours, kernel = (next_log_probs(torch.bfloat16, used) for used in (True, False))
    exact = next_log_probs(torch.float32, False)  # of the same, rounded weights
    assert not torch.equal(ours, kernel)
    errors = [(found - exact).abs().mean() for found in (ours, kernel)]
    assert errors[0] <= 1.2 * errors[1], errors
