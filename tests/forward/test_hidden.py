"""Hidden states that predict the right token, and heads of five families with their extras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdft_lightning.errors import UserError
from sdft_lightning.forward.hidden import (
    apply_head,
    check_output_head,
    completion_hidden_states,
    output_head,
)
from sdft_lightning.forward.kv_cache import Inputs, run
from sdft_lightning.forward.layout import SplitPrompts, behind_prefix
from sdft_lightning.losses.masking import position_ids
from sdft_lightning.types import Tokens

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES = ["llama", "llama_tied", "gemma2", "cohere", "granite", "gpt2"]


def build(family: str) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    if family in ("llama", "llama_tied"):
        config = hf.LlamaConfig(**SIZES, tie_word_embeddings=family == "llama_tied")
        model: Any = hf.LlamaForCausalLM(config)
    elif family == "gemma2":
        config = hf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
        model = hf.Gemma2ForCausalLM(config)
    elif family == "cohere":
        model = hf.CohereForCausalLM(hf.CohereConfig(**SIZES, logit_scale=0.25))
    elif family == "granite":
        model = hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=4.0))
    else:
        config = hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        model = hf.GPT2LMHeadModel(config)
        nn.init.normal_(model.transformer.wte.weight, std=0.5)
    return model.eval()


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two prompts of 3 and 5 tokens padded on the left, completions of 4 and 2 on the right."""
    prompt = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
    completion = torch.tensor([[20, 21, 22, 23], [30, 31, 0, 0]])
    completion_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    return prompt, prompt != 0, completion, completion_mask


def alone(model: Any, row: int) -> tuple[Tensor, int]:
    """The model's own logits for one row without any padding, and the length of its prompt."""
    prompt, prompt_mask, completion, completion_mask = batch()
    tokens = torch.cat([prompt[row][prompt_mask[row]], completion[row][completion_mask[row]]])
    return model(input_ids=tokens[None]).logits[0], int(prompt_mask[row].sum())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_predict_their_own_token_and_not_the_next(family: str) -> None:
    model = build(family)
    prompt, prompt_mask, completion, completion_mask = batch()
    hidden = completion_hidden_states(
        model, Tokens(prompt, prompt_mask), Tokens(completion, completion_mask), completion_mask
    )
    logits = apply_head(output_head(model), hidden)  # (6, V)
    expected = []
    for row, count in ((0, 4), (1, 2)):
        own, length = alone(model, row)
        expected.append(own[length - 1 : length - 1 + count])
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_only_kept_tokens_come_back_row_by_row() -> None:
    model = build("llama")
    prompt, prompt_mask, completion, completion_mask = batch()
    keep = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]]).bool()
    arguments = (model, Tokens(prompt, prompt_mask), Tokens(completion, completion_mask))
    every = completion_hidden_states(*arguments, completion_mask)
    some = completion_hidden_states(*arguments, keep)
    torch.testing.assert_close(some, every[[2, 3, 5]], rtol=0, atol=1e-6)
    assert completion_hidden_states(*arguments, torch.zeros_like(keep)).shape == (0, 16)


def plain_states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Of rows that are padded on either side, `(B, L, D)`."""
    found: Tensor = run(model, Inputs.behind(Tokens(ids, mask))).last_hidden_state
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padding_changes_nothing(family: str) -> None:
    model = build(family)
    tokens = torch.tensor([[7, 8, 9]])
    padded = torch.tensor([[3, 3, 3, 7, 8, 9]])  # padding with an id that means something
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]]).bool()
    own = model.base_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(plain_states(model, padded, mask)[:, 3:], own, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prefix_gives_the_states_of_the_whole_row() -> None:
    model = build("llama")
    tokens = torch.tensor([[7, 8, 9, 10, 11], [7, 8, 12, 13, 14]])
    whole = plain_states(model, tokens, torch.ones_like(tokens).bool())
    rest = torch.ones(2, 3).bool()
    parts = run(
        model, behind_prefix(model, SplitPrompts(tokens[0, :2], Tokens(tokens[:, 2:], rest)))
    ).last_hidden_state
    torch.testing.assert_close(parts, whole[:, 2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_head_applied_to_states_gives_the_models_logits(family: str) -> None:
    model = build(family)
    ids = torch.tensor([[5, 6, 7, 8], [40, 41, 42, 43]])
    mask = torch.ones_like(ids).bool()
    own = model(input_ids=ids).logits
    ours = apply_head(output_head(model), plain_states(model, ids, mask))
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    check_output_head(model)


def test_scale_and_cap_are_read_from_the_config() -> None:
    found = {family: output_head(build(family)) for family in FAMILIES}
    assert [found[f].scale for f in FAMILIES] == [1.0, 1.0, 1.0, 0.25, 0.25, 1.0]
    assert [found[f].softcap for f in FAMILIES] == [None, None, 2.0, None, None, None]


def test_the_head_is_a_view_of_the_models_own_weight() -> None:
    tied, untied = build("llama_tied"), build("llama")
    assert output_head(tied).weight is tied.get_input_embeddings().weight
    assert output_head(untied).weight is untied.lm_head.weight
    assert output_head(untied).weight is not untied.get_input_embeddings().weight


def changed_logits(change: Callable[[Tensor], Tensor]) -> Any:
    model = build("llama")
    forward = model.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = patched
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.1,
        lambda logits: logits + torch.arange(64) * 0.1,
        lambda logits: 5 * torch.tanh(logits / 5),
        lambda logits: logits.roll(1, dims=1),
    ],
    ids=["scale", "bias", "softcap", "shift"],
)
def test_a_model_that_changes_its_logits_otherwise_is_refused(
    change: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(UserError, match=r"model\.policy\.name.*LlamaForCausalLM"):
        check_output_head(changed_logits(change))
    check_output_head(changed_logits(lambda logits: logits))


def test_the_check_puts_every_mode_back() -> None:
    model = build("llama").train()
    model.model.layers[1].eval()
    check_output_head(model)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[1].training


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = build("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match=r"model\.policy\.name.*no linear output head.*Sequential"):
        output_head(model)


def test_positions_are_passed_and_not_counted_from_the_padding() -> None:
    model = build("gpt2")  # learned absolute positions: a shift would show at once
    seen: dict[str, Tensor] = {}
    forward = model.base_model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(position_ids=kwargs["position_ids"])
        return forward(*args, **kwargs)

    model.base_model.forward = spy
    mask = torch.tensor([[0, 0, 1, 1]]).bool()
    plain_states(model, torch.tensor([[0, 0, 5, 6]]), mask)
    assert seen["position_ids"].tolist() == position_ids(mask).tolist() == [[0, 0, 0, 1]]
