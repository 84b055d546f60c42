"""Models on shared frozen weights: base, merged, with adapters of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.models.lora import (
    adapter_parameters,
    base_copy,
    effective_weights,
    is_adapted,
    merged_copy,
    sharing_copy,
)

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
Make = Callable[..., Any]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


def storages(model: Any) -> dict[int, int]:
    """Bytes of each storage of a model's parameters."""
    found = [p.untyped_storage() for p in model.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_copy_is_the_base_model_and_takes_no_memory(
    make_adapted: Make, make_model: Make, tied: bool
) -> None:
    adapted = make_adapted(tie_word_embeddings=tied)
    base = base_copy(adapted)
    plain = make_model(tie_word_embeddings=tied)
    assert torch.equal(logits(base), logits(plain))
    assert not torch.equal(logits(adapted), logits(base))
    assert {n for n, _ in base.named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert storages(base).keys() <= storages(adapted).keys()
    assert not is_adapted(base)
    assert is_adapted(adapted)


def test_a_sharing_copy_has_adapters_of_its_own_and_no_second_base(make_adapted: Make) -> None:
    adapted = make_adapted()
    copied = sharing_copy(adapted)
    assert torch.equal(logits(copied), logits(adapted))
    more = storages(copied).keys() - storages(adapted).keys()
    adapters = adapter_parameters(adapted)
    assert sum(storages(copied)[each] for each in more) == 4 * sum(
        p.numel() for p in adapters.values()
    )
    before = logits(copied)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.add_(0.1)
    assert torch.equal(logits(copied), before)
    assert not torch.equal(logits(adapted), before)
    copied.eval()
    adapted.train()
    assert not any(part.training for part in copied.modules())


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_copy_has_the_adapted_logits_and_leaves_the_student_as_it_was(
    make_adapted: Make, make_model: Make, tied: bool
) -> None:
    adapted = make_adapted(tie_word_embeddings=tied)
    before, expected = snapshot(adapted), logits(adapted)
    merged = merged_copy(adapted)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    base = logits(make_model(tie_word_embeddings=tied))
    assert float((expected - base).abs().max()) > 0.1  # far outside the tolerance
    assert not is_adapted(merged)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert all(torch.equal(before[name], p) for name, p in adapted.named_parameters())
    assert torch.equal(logits(adapted), expected)


def test_layers_that_keep_weights_the_other_way_round_merge_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from sdft_lightning.models.lora import LoRA, add_adapter_

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    model: Any = GPT2LMHeadModel(config).eval()
    add_adapter_(model, LoRA(r=2), 0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    torch.testing.assert_close(logits(merged_copy(model)), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_effective_weights_are_the_merged_ones_under_the_base_models_names(
    make_adapted: Make, make_model: Make, dtype: torch.dtype
) -> None:
    model = make_adapted().to(dtype)
    read = effective_weights(model)
    merged = dict(merged_copy(model.float()).named_parameters())
    assert read.keys() == merged.keys() == dict(make_model().named_parameters()).keys()
    for name, weight in merged.items():
        assert read[name]().dtype == torch.float32
        torch.testing.assert_close(read[name](), weight, rtol=1e-5, atol=1e-5)
