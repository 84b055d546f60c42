"""Adapters on weights that the module around them reads by itself are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sdft_lightning.errors import UserError
from sdft_lightning.models.lora import LoRA, add_adapter_, check_adapters_are_called


def test_layers_that_are_called_pass_and_hooks_are_gone(make_adapted: Callable[..., Any]) -> None:
    model = make_adapted()
    check_adapters_are_called(model)
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_a_layer_that_nothing_uses_passes_and_weights_and_modes_stay(model: Any) -> None:
    model.model.picture = nn.Linear(4, 4)
    add_adapter_(model, LoRA(r=2), seed=0)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_adapters_are_called(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_a_weight_that_is_read_in_training_only_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = type(model.model.layers[0].mlp).forward

    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return called(self, states)
        gated = nn.functional.silu(self.gate_proj(states)) * self.up_proj(states)
        return nn.functional.linear(gated, self.down_proj.weight)

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", forward)
    add_adapter_(model, LoRA(r=2), seed=0)
    with pytest.raises(UserError, match="LlamaMLP reads the weights of down_proj past"):
        check_adapters_are_called(model)


def test_a_weight_that_is_read_past_its_adapter_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        gated = nn.functional.silu(self.gate_proj(states)) * self.up_proj(states)
        return nn.functional.linear(gated, self.down_proj.weight)

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", forward)
    add_adapter_(model, LoRA(r=2), seed=0)
    with pytest.raises(
        UserError, match=r"lora.target_modules: LlamaMLP reads .* of down_proj"
    ) as e:
        check_adapters_are_called(model)
    assert "[gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj]" in str(e.value)


def test_mamba_reads_one_weight_by_itself() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    add_adapter_(model, LoRA(r=2, target_modules=["in_proj", "dt_proj"]), seed=0)
    with pytest.raises(UserError, match=r"MambaMixer reads the weights of dt_proj past"):
        check_adapters_are_called(model)
