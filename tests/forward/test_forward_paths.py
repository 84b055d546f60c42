"""What a model can do is found out once, without a trace, and travels with its copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.forward import forward_paths
from sdft_lightning.forward.forward_paths import ForwardPaths, paths_of
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.rollout.student import StudentPasses

EVERY = ForwardPaths()


def state_space_model() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=272, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3
    )
    return MambaForCausalLM(config).eval()


def encoder() -> Any:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    return BertLMHeadModel(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_llama_can_do_everything_in_any_precision(model: Any, dtype: torch.dtype) -> None:
    assert paths_of(model.to(dtype)) == EVERY


def test_adapters_change_nothing(make_adapted: Callable[..., Any]) -> None:
    assert paths_of(make_adapted()) == EVERY


def test_steps_of_a_state_space_model_get_no_mask_and_its_rows_stay() -> None:
    found = paths_of(state_space_model())
    assert found == ForwardPaths(True, "unmasked", False, False, False, False, False, False)


def test_it_is_found_once_and_copies_remember_it(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = paths_of(model)
    monkeypatch.setattr(forward_paths, "_find_paths", None)  # a second time would be a TypeError
    assert paths_of(model) is found
    assert paths_of(copy.deepcopy(model)) == found
    assert paths_of(StudentPasses("bfloat16").at(model, 0).sampler()) == found


def test_it_leaves_no_trace(model: Any) -> None:
    model.train()
    model.model.layers[1].eval()
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    before = torch.random.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    paths_of(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (model.training, model.model.layers[1].training, calls) == (True, False, [])
    model(input_ids=torch.tensor([[5]]))
    assert calls == [1]  # the hook is there again


def test_a_path_that_fails_or_differs_is_not_used(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(model.model).forward

    def wrong_with_a_mask_of_four_dimensions(self: Any, **options: Any) -> Any:
        mask = options.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            options["attention_mask"] = torch.zeros_like(mask)  # sees everything
        return forward(self, **options)

    def without_choice(self: Any, indices: Any) -> None:
        raise NotImplementedError

    from transformers.cache_utils import DynamicLayer

    monkeypatch.setattr(type(model.model), "forward", wrong_with_a_mask_of_four_dimensions)
    monkeypatch.setattr(DynamicLayer, "batch_select_indices", without_choice)
    assert paths_of(model) == EVERY._replace(packs=False, drops_rows=False)


def test_an_encoder_is_refused_since_it_sees_tokens_that_follow() -> None:
    with pytest.raises(
        UserError, match=r"model\.policy\.name: what BertLMHeadModel .*is_decoder: true"
    ):
        paths_of(encoder())


def test_weights_that_have_diverged_are_not_called_another_kind_of_model(model: Any) -> None:
    model.lm_head.weight.data[:] = float("nan")
    assert paths_of(model).decoding == "masked"


def test_a_model_that_does_not_read_token_ids_is_refused_when_it_is_loaded(
    model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    def fails(self: Any, **options: Any) -> None:
        raise ValueError("pixel_values cannot be None")

    monkeypatch.setattr(LlamaModel, "forward", fails)
    with pytest.raises(UserError, match=r"LlamaForCausalLM .* pixel_values cannot be None"):
        load_policy(Policy(str(model_folder)))
