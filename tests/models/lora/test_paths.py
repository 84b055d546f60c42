"""Hidden states, loss, cached prompts, scores and rollouts of an adapted model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdft_lightning.forward.hidden import (
    PromptCache,
    apply_head,
    completion_hidden_states,
    output_head,
)
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.forward.scoring import score_continuations
from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import Divergence, forward_kl
from sdft_lightning.losses.masking import position_ids, sequence_weights
from sdft_lightning.models.lora import (
    LoRA,
    adapter_parameters,
    add_adapter_,
    base_copy,
    sharing_copy,
)
from sdft_lightning.rollout import StudentPasses, greedy_rollout
from sdft_lightning.types import ScoringBatch, Tokens

Make = Callable[..., Any]
SHARED = list(range(20, 32))


@pytest.fixture
def batch(pad_left: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Two prompts with a long common beginning, and completions of two lengths."""
    prompt_ids, prompt_mask = pad_left([[*SHARED, 5, 6, 7], [*SHARED, 8]])
    completion_ids = torch.tensor([[9, 10, 11], [12, 13, 0]])
    completion_mask = torch.tensor([[True, True, True], [True, True, False]])
    return prompt_ids, prompt_mask, completion_ids, completion_mask, completion_mask


def plain_logits(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """The model's own logits `(N, V)` at the kept tokens."""
    prompt_ids, prompt_mask, completion_ids, completion_mask, keep = batch
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    output = model(
        input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
    )
    chosen: Tensor = output.logits[:, prompt_ids.shape[1] - 1 : -1][keep]
    return chosen


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_hidden_states_and_head_give_the_adapted_models_own_logits(
    make_adapted: Make, batch: tuple[Tensor, ...], tied: bool, share: bool
) -> None:
    model = make_adapted(tie_word_embeddings=tied)
    hidden = completion_hidden_states(
        model, Tokens(*batch[:2]), Tokens(*batch[2:4]), batch[4], share_prefix=share
    )
    ours = apply_head(output_head(model), hidden).detach()
    torch.testing.assert_close(ours, plain_logits(model, batch).detach(), rtol=1e-4, atol=1e-4)
    base = plain_logits(base_copy(model), batch)
    assert float((ours - base).abs().max()) > 0.1  # the adapters are in them


def biased() -> Any:
    """A model whose head has a bias."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    model: Any = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    add_adapter_(model, LoRA(r=4), 0)
    for parameter in adapter_parameters(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("kind", ["tied", "untied", "biased"])
def test_gradients_of_the_bounded_loss_reach_the_adapters_alone_and_equal_the_plain_ones(
    make_adapted: Make, batch: tuple[Tensor, ...], kind: str
) -> None:
    model = biased() if kind == "biased" else make_adapted(tie_word_embeddings=kind == "tied")
    teacher = sharing_copy(model).eval()
    for parameter in adapter_parameters(teacher).values():
        parameter.data *= 0.5
    keep = batch[4]
    weights = sequence_weights(keep)[keep]
    with torch.no_grad():
        teacher_hidden = completion_hidden_states(
            teacher, Tokens(*batch[:2]), Tokens(*batch[2:4]), batch[4]
        )
        teacher_logits = plain_logits(teacher, batch)
    results = []
    for bounded in (True, False):
        model.zero_grad()
        if bounded:
            loss, _ = bounded_divergence(
                teacher_hidden,
                output_head(teacher),
                completion_hidden_states(model, Tokens(*batch[:2]), Tokens(*batch[2:4]), batch[4]),
                output_head(model),
                batch[2][keep],
                weights,
                Divergence("forward_kl"),
                chunk_elements=100,  # less than one token: one at a time
            )
        else:
            loss = (forward_kl(teacher_logits, plain_logits(model, batch)) * weights).sum()
        loss.backward()
        frozen = [p for name, p in model.named_parameters() if "lora_" not in name]
        assert all(p.grad is None for p in frozen)
        results.append([p.grad.clone() for p in adapter_parameters(model).values()])
    assert max(float(grad.abs().max()) for grad in results[0]) > 1e-3
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_leaves_loss_and_gradients_of_adapters_as_they_are(
    model_folder: Path, batch: tuple[Tensor, ...]
) -> None:
    results = []
    for checkpointing in (False, True):
        model = load_policy(
            Policy(str(model_folder), gradient_checkpointing=checkpointing, lora=LoRA(r=4))
        ).model
        assert any(getattr(p, "gradient_checkpointing", False) for p in model.modules()) == (
            checkpointing
        )
        completion_hidden_states(
            model, Tokens(*batch[:2]), Tokens(*batch[2:4]), batch[4]
        ).sum().backward()
        results.append({n: p.grad for n, p in adapter_parameters(model).items()})
    # B is zero at the start, so that A has no gradient yet.
    assert all(float(g.abs().max()) > 0 for n, g in results[0].items() if ".lora_B." in n)
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_reaches_the_adapters_too(
    model_folder: Path, batch: tuple[Tensor, ...]
) -> None:
    model = load_policy(
        Policy(str(model_folder), gradient_checkpointing=True, lora=LoRA(r=4))
    ).model
    layers = [part for part in model.modules() if hasattr(part, "_gradient_checkpointing_func")]
    assert layers
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
    completion_hidden_states(
        model, Tokens(*batch[:2]), Tokens(*batch[2:4]), batch[4]
    ).sum().backward()
    first = model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert float(first.grad.abs().max()) > 0


def test_cached_prompts_of_an_adapted_model(make_adapted: Make, batch: tuple[Tensor, ...]) -> None:
    model, cache = make_adapted(), PromptCache()
    for _ in range(2):
        cached = completion_hidden_states(
            model, Tokens(*batch[:2]), Tokens(*batch[2:4]), batch[4], cache=cache
        )
        plain = completion_hidden_states(
            model, Tokens(*batch[:2]), Tokens(*batch[2:4]), batch[4], share_prefix=False
        )
        torch.testing.assert_close(cached, plain.detach(), rtol=1e-4, atol=1e-5)


def test_scores_of_choices_are_those_of_the_adapted_model(
    make_adapted: Make, batch: tuple[Tensor, ...]
) -> None:
    model = make_adapted()
    owner = torch.tensor([0, 1])
    choices = ScoringBatch(batch[0], batch[1], batch[2], batch[3], owner, [0, 1])
    expected = torch.log_softmax(plain_logits(model, batch).detach(), dim=-1)
    expected = expected.gather(-1, batch[2][batch[4]].unsqueeze(-1)).squeeze(-1)
    sums = [float(expected[:3].sum()), float(expected[3:].sum())]
    for share in (True, False):
        found = [score.log_likelihood for score in score_continuations(model, choices, share)]
        assert found == pytest.approx(sums, abs=1e-3)


def test_a_rollout_of_an_adapted_model_is_that_of_its_merged_weights(
    make_adapted: Make, batch: tuple[Tensor, ...]
) -> None:
    from sdft_lightning.models.lora import merged_copy

    model = make_adapted()
    found, merged, base = (
        greedy_rollout(each, Tokens(batch[0], batch[1]), 12, [2], 2).completion_ids
        for each in (model, merged_copy(model), base_copy(model))
    )
    assert torch.equal(found, merged)
    assert not torch.equal(found, base)


def test_sampling_weights_follow_the_adapters(make_adapted: Make) -> None:
    model, weights = make_adapted(moved=False), StudentPasses("bfloat16")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = weights.at(model, 0).sampler()(input_ids=ids).logits
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1)
        after = weights.at(model, 1).sampler()(input_ids=ids).logits
        expected = model(input_ids=ids).logits
    assert float((after - before).abs().max()) > 0.5
    torch.testing.assert_close(after.float(), expected, rtol=0.1, atol=0.3)


def test_a_quantized_model_is_sampled_from_as_it_is(make_adapted: Make) -> None:
    model = make_adapted()
    model.is_quantized = True
    assert StudentPasses("bfloat16").at(model, 0).sampler() is model
