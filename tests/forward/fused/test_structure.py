"""Which models are computed in fused blocks, and which are left to transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sdft_lightning.forward.fused import decoder_of, join_
from sdft_lightning.forward.fused.structure import joined

Make = Callable[..., Any]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_parts_of_known_kinds_are_found(build: Make, kind: str) -> None:
    model = build(kind)
    decoder = decoder_of(model)
    assert decoder is not None
    assert (decoder.heads, decoder.key_heads) == (4, 2)
    assert decoder.head_size == (16 if kind == "qwen3" else 8)
    assert len(decoder.layers) == 3
    assert decoder.layers[1].down is model.model.layers[1].mlp.down_proj
    assert (decoder.layers[0].q_norm is not None) is (kind == "qwen3")


def hooked(model: Any) -> None:
    model.model.layers[2].mlp.register_forward_hook(lambda *_: None)


def before_hooked(model: Any) -> None:
    model.model.norm.register_forward_pre_hook(lambda *_: None)


def backward_hooked(model: Any) -> None:
    model.model.layers[0].register_full_backward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    model.model.layers[0].self_attn.forward = lambda *_, **__: None


def other_linear(model: Any) -> None:
    class Linear(nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj = Linear(32, 48, bias=False)


def checkpointed(model: Any) -> None:
    model.gradient_checkpointing_enable()


def half_of_it(model: Any) -> None:
    model.model.norm.to(torch.bfloat16)


def flash(model: Any) -> None:
    model.config._attn_implementation = "flash_attention_2"


CHANGES = [
    hooked,
    before_hooked,
    backward_hooked,
    replaced,
    other_linear,
    checkpointed,
    half_of_it,
    flash,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_somebody_has_changed_is_left_to_transformers(
    build: Make, change: Callable[[Any], None]
) -> None:
    model = build("llama")
    change(model)
    assert decoder_of(model) is None


def test_dropout_matters_in_training_only(build: Make) -> None:
    model = build("llama", attention_dropout=0.1)
    assert decoder_of(model) is None
    assert decoder_of(model.eval()) is not None


def test_other_kinds_and_activations_are_left_to_transformers(build: Make) -> None:
    import transformers as hf

    assert decoder_of(build("llama", hidden_act="gelu")) is None
    assert decoder_of(hf.MistralForCausalLM(hf.MistralConfig(**SMALL))) is None
    config = hf.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert decoder_of(hf.Qwen2ForCausalLM(config)) is None
    tiny = hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    assert decoder_of(hf.GPT2LMHeadModel(tiny)) is None


def test_adapters_are_left_to_transformers(build: Make) -> None:
    peft = pytest.importorskip("peft")
    model = build("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert decoder_of(model) is None


def test_weights_laid_together_are_the_same_and_need_no_copy(build: Make, kind: str) -> None:
    model = build(kind)
    before = {name: each.clone() for name, each in model.named_parameters()}
    decoder = decoder_of(model)
    assert decoder is not None
    layer = decoder.layers[0]
    parts = [layer.q, layer.k, layer.v]
    apart, bias = joined(parts, torch.float32)
    assert apart.data_ptr() != layer.q.weight.data_ptr()
    join_(model)
    together, same_bias = joined(parts, torch.float32)
    assert together.data_ptr() == layer.q.weight.data_ptr()
    assert torch.equal(together, apart)
    assert (bias is None) is (kind in ("llama", "qwen3"))
    if bias is not None and same_bias is not None:
        assert torch.equal(bias, same_bias)
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name]), name
    with torch.no_grad():
        layer.k.weight.fill_(7.0)  # a refresh is seen
    assert (joined(parts, torch.float32)[0] == 7.0).any()
    assert joined(parts, torch.bfloat16)[0].dtype == torch.bfloat16


def test_weights_next_to_each_other_by_chance_in_another_order_are_copied(build: Make) -> None:
    model = build("llama")
    join_(model)
    layer = model.model.layers[0].self_attn
    wrong = [layer.k_proj, layer.q_proj]
    weight, _ = joined(wrong, torch.float32)
    assert torch.equal(weight, torch.cat([each.weight for each in wrong]))


def test_angles_that_change_with_the_length_of_a_call_are_left_to_transformers(
    build: Make,
) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build("llama", rope_parameters=dynamic)
    assert model.model.rotary_emb.rope_type == "dynamic"
    assert decoder_of(model) is None
