"""Nothing is random in a forward pass, whatever a rate is called; saved configs keep the rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.randomness import base_config, check_no_randomness, turn_off_randomness_

IDS = torch.tensor([[5, 6, 7, 8]])
_SMALL = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {
    **_SMALL,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# Rates in modules, in functional dropout, of layers that are left out, of a router's noise.
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "seed_oss": ("SeedOss", {**_GROUPED, "head_dim": 8}, ("residual_dropout", "attention_dropout")),
    "starcoder2": ("Starcoder2", _GROUPED, ("residual_dropout", "embedding_dropout")),
    "opt": (
        "OPT",
        {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
        ("layerdrop", "dropout"),
    ),
    "falcon": ("Falcon", _SMALL, ("hidden_dropout", "attention_dropout")),
    "bloom": (
        "Bloom",
        {"vocab_size": 272, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        ("hidden_dropout",),
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 272, "n_embd": 32, "n_layer": 2, "n_head": 4},
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 4}, ("router_jitter_noise",)),
}


def build(kind: str, rate: float) -> Any:
    prefix, options, rates = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(**options, **dict.fromkeys(rates, rate))
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    return getattr(transformers, name)(config)


@pytest.mark.parametrize("kind", KINDS)
def test_two_passes_in_train_mode_are_equal_whatever_the_rate_is_called(kind: str) -> None:
    model = build(kind, 0.3).train()
    before = model.config.to_dict()
    with pytest.raises(UserError, match=rf"model\.policy\.name: {type(model).__name__} is random"):
        check_no_randomness(model)
    expected = model.eval()(IDS).logits
    turn_off_randomness_(model.train())
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    check_no_randomness(model)
    assert torch.equal(model(IDS).logits, expected)
    assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} <= {0.0}
    assert all(getattr(model.config, rate) == 0.0 for rate in KINDS[kind][2])
    with base_config(model):
        assert model.config.to_dict() == before
    assert all(getattr(model.config, rate) == 0.0 for rate in KINDS[kind][2])


def test_rates_of_a_config_inside_a_config_are_off_and_are_remembered(
    make_model: Callable[..., Any],
) -> None:
    model = make_model()
    model.config.text_config = type(model.config)(attention_dropout=0.5)
    turn_off_randomness_(model)
    turn_off_randomness_(model)  # a second time: what is remembered is not 0
    assert model.config.text_config.attention_dropout == 0.0
    with base_config(model):
        assert model.config.text_config.attention_dropout == 0.5


def test_randomness_without_a_rate_is_refused_and_random_numbers_stay_as_they_were(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    head = model.lm_head

    def noisy(hidden: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.linear(hidden, head.weight)
        return logits + torch.randn_like(logits) * (1e-3 if head.training else 0.0)

    monkeypatch.setattr(head, "forward", noisy)
    state = torch.random.get_rng_state()
    with pytest.raises(
        UserError, match=r"model\.policy\.name: LlamaForCausalLM is random in training"
    ):
        check_no_randomness(model.eval())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(part.training for part in model.modules())


def test_an_event_that_is_rare_is_noticed_since_numbers_are_drawn(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    layer = model.model.layers[0]
    forward, drawn = layer.forward, []

    def dropped(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append(float(torch.rand([])))
        return hidden if len(drawn) == 6 else forward(hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", dropped)
    with pytest.raises(UserError, match="two passes over one row in train mode"):
        check_no_randomness(model)


def test_a_model_that_is_another_function_in_train_mode_is_refused(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    norm, forward = model.model.norm, model.model.norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: forward(x) * (2.0 if norm.training else 1.0))
    with pytest.raises(UserError, match="passes in train and in eval mode differ"):
        check_no_randomness(model)


def test_a_router_that_draws_experts_in_training_is_refused() -> None:
    options = {**_GROUPED, "num_local_experts": 4}
    model = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**options))
    turn_off_randomness_(model)
    with pytest.raises(UserError, match="PhimoeForCausalLM draws its experts"):
        check_no_randomness(model)


def test_both_roles_are_quiet_and_the_exported_config_is_that_of_the_base(
    fit_module: Callable[..., Any], make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from sdft_lightning.callbacks.export import export_model
    from sdft_lightning.models.lora import LoRA

    base = make_model_folder("base", attention_dropout=0.25)
    for lora in (None, LoRA(r=2)):
        module = fit_module(model={"policy": {"name": str(base), "lora": lora}})
        assert module.student.config.attention_dropout == 0.0
        assert module.teacher.network.config.attention_dropout == 0.0
        folder = tmp_path / f"out-{lora is None}"
        export_model(module, folder)
        saved = json.loads((folder / "config.json").read_text())
        known = json.loads((base / "config.json").read_text())
        assert saved["attention_dropout"] == 0.25
        assert saved == {**known, **{key: saved[key] for key in ("use_cache",) if key in saved}}
        assert module.student.config.attention_dropout == 0.0
        assert load_policy(Policy(str(folder))).model.config.attention_dropout == 0.0


def test_the_folder_that_vllm_reads_has_the_config_of_the_base(
    model_folder: Path, tmp_path: Path, make_model_folder: Callable[..., Path]
) -> None:
    from sdft_lightning.rollout.vllm.weights import Form, write_weights

    model = load_policy(Policy(str(make_model_folder(attention_dropout=0.25)))).model
    write_weights(model, tmp_path / "weights", Form(torch.float32))
    saved = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert saved["attention_dropout"] == 0.25
