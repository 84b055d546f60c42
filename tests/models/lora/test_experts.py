"""Adapters on mixtures of experts: adapted, merged, averaged, counted and saved, or told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sdft_lightning.callbacks.export import export_model
from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.lora import (
    LoRA,
    adapter_layers,
    adapter_parameters,
    add_adapter_,
    base_copy,
    effective_weights,
    frozen_matrices,
    merged_copy,
    save_adapter,
)
from sdft_lightning.teacher import EMATeacher

IDS = torch.arange(10, 22).unsqueeze(0)  # (1, 12)
_SIZES = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_LOCAL = {"num_local_experts": 4}
KINDS = {
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "Mixtral": _LOCAL,
    "GptOss": {**_LOCAL, "head_dim": 8},
    "GraniteMoe": _LOCAL,
}


def build(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(**_SIZES, **KINDS[kind])
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def moved(kind: str, lora: LoRA | None = None) -> Any:
    """An adapted model whose adapters are not at their start."""
    model = build(kind)
    add_adapter_(model, lora or LoRA(r=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_fused_experts_are_adapted_and_merge_into_what_they_compute(kind: str) -> None:
    plain, model = build(kind), moved(kind)
    fused = {getattr(layer, "parameter_name", "") for layer in adapter_layers(model).values()}
    assert {"gate_up_proj", "down_proj"} <= fused
    assert (logits(model) - logits(plain)).abs().max() > 0.1
    merged = merged_copy(model)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(base_copy(model)), logits(plain))
    weights, expected = effective_weights(model), dict(merged.named_parameters())
    assert weights.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(read(), expected[name]) for name, read in weights.items())
    model.train()(IDS).logits.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter_parameters(model).values())


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_experts_alone_count_in_the_teachers_distance_and_are_averaged(kind: str) -> None:
    model = build(kind)
    add_adapter_(model, LoRA(r=2), seed=0)
    teacher = EMATeacher(0.25)
    teacher.copy_from(model)
    assert teacher.distance(model) == 0.0
    experts = {n: p for n, p in adapter_parameters(model).items() if ".experts." in n}
    start = {name: parameter.detach().clone() for name, parameter in experts.items()}
    for parameter in experts.values():
        parameter.data += 0.1
    assert teacher.distance(model) > 1e-3
    teacher.update_(model, 1)
    mine = adapter_parameters(teacher.network)
    for name, parameter in experts.items():
        torch.testing.assert_close(mine[name], 0.75 * start[name] + 0.25 * parameter)


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_an_adapter_folder_of_experts_is_loaded_by_peft(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = moved(kind)
    build(kind).save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_a_fit_with_validation_and_export_ends_with_the_weights_that_were_trained(
    kind: str,
    tokenizer: Any,
    train_file: Path,
    tmp_path: Path,
    fit_module: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "base"
    build(kind).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    module = fit_module(
        model={
            "policy": {"name": str(folder), "lora": LoRA(r=2)},
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        },
        data={"model_name": str(folder), "validation": str(train_file), "grader": "contains"},
        max_steps=2,
        accumulate_grad_batches=2,
        limit_val_batches=1,
        val_check_interval=2,
        log_every_n_steps=1,
    )
    metrics = module.trainer.callback_metrics
    assert metrics["train/teacher_distance"] > 0
    assert "val/task/task/accuracy" in metrics
    export_model(module, tmp_path / "out")
    exported = load_policy(Policy(str(tmp_path / "out"))).model
    torch.testing.assert_close(
        logits(exported), logits(module.student.eval()), rtol=1e-3, atol=1e-4
    )
    assert ("mlp.router (2)" in capsys.readouterr().out) == (kind == "GptOss")


def test_linear_layers_beside_fused_experts_that_peft_leaves_out_are_told() -> None:
    config = transformers.DeepseekV3Config(
        **{**_SIZES, "num_key_value_heads": 4, "num_hidden_layers": 1},
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    add_adapter_(model, LoRA(r=2), seed=0)
    frozen = frozen_matrices(model)
    assert "shared_experts.gate_proj" in frozen
    assert "experts.down_proj" not in frozen


def test_a_linear_layer_that_returns_more_than_a_vector_is_not_adapted() -> None:
    options = {**_SIZES, **_LOCAL, "head_dim": 8, "intermediate_size_mlp": 32}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**options)).eval()
    refused = copy.deepcopy(model)
    add_adapter_(model, LoRA(r=2), seed=0)
    assert logits(model).shape == (1, 12, 272)
    assert "feed_forward.router" in frozen_matrices(model)
    with pytest.raises(UserError, match=r"'router' is no linear layer of Llama4ForCausalLM"):
        add_adapter_(refused, LoRA(target_modules=["router"]), seed=0)


def test_where_all_linear_finds_nothing_it_is_a_sentence(make_model: Callable[..., Any]) -> None:
    model = make_model()
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match=r"lora.target_modules: all-linear finds no linear layer"):
        add_adapter_(model, LoRA(), seed=0)


def test_what_peft_refuses_is_a_sentence_with_the_layers_that_there_are() -> None:
    config = transformers.MambaConfig(vocab_size=272, hidden_size=32, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config)
    with pytest.raises(UserError, match=r"lora.target_modules: MambaForCausalLM.*of .*in_proj"):
        add_adapter_(model, LoRA(target_modules=["out_proj"]), seed=0)
