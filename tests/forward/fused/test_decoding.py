"""Fused decoding steps give the logits of the model itself, and the same completions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.forward.fused import DecodingSteps, decoder_of, decoding, read_prompts
from sdft_lightning.forward.layout import split_prompts
from sdft_lightning.rollout import Sampling, decode_mode, generate_rollout
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.types import Rollout, Tokens

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
Make = Callable[..., Any]

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


def steps_of(model: Any, given: Batch, samples: int = 1, in_pieces: bool = False) -> DecodingSteps:
    ids, mask, _, _ = given
    decoder = decoder_of(model)
    assert decoder is not None
    dtype = model.lm_head.weight.dtype
    pieces = [slice(0, 2), slice(2, 5)] if in_pieces else [slice(0, 5)]
    read = [
        read_prompts(decoder, split_prompts(Tokens(ids[part], mask[part])), dtype)
        for part in pieces
    ]
    return DecodingSteps(decoder, model.lm_head, read, samples, 6)


def own_logits(model: Any, given: Batch, appended: Tensor) -> Tensor:
    """Of the model itself, row by row without padding or cache."""
    ids, mask, _, _ = given
    rows = [
        torch.cat([each[kept], more]) for each, kept, more in zip(ids, mask, appended, strict=True)
    ]
    return torch.stack([model(input_ids=row.unsqueeze(0)).logits[0, -1] for row in rows])


@torch.no_grad()
def test_each_step_gives_the_models_logits(build: Make, batch: Make, kind: str) -> None:
    model, given = build(kind).eval(), batch()
    steps = steps_of(model, given)
    appended = torch.randint(2, 64, (5, 6), generator=torch.Generator().manual_seed(3))
    assert_near(steps.logits, own_logits(model, given, appended[:, :0]))
    for count in range(6):
        assert_near(
            steps.step(appended[:, count]), own_logits(model, given, appended[:, : count + 1])
        )


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_rows_that_are_left_go_on_as_before(build: Make, batch: Make) -> None:
    model, given = build("llama").eval(), batch()
    appended = torch.randint(2, 64, (5, 3), generator=torch.Generator().manual_seed(3))
    steps = steps_of(model, given)
    steps.step(appended[:, 0])
    steps.keep(torch.tensor([1, 4]))
    steps.step(appended[[1, 4], 1])
    steps.keep(torch.tensor([1]))
    assert_near(steps.step(appended[[4], 2]), own_logits(model, given, appended)[[4]])


@pytest.mark.parametrize("in_pieces", [False, True])
@torch.no_grad()
def test_samples_of_a_prompt_stand_together(build: Make, batch: Make, in_pieces: bool) -> None:
    model, given = build("llama").eval(), batch()
    steps = steps_of(model, given, samples=2, in_pieces=in_pieces)
    appended = torch.randint(2, 64, (10, 1), generator=torch.Generator().manual_seed(3))
    found = steps.step(appended[:, 0])
    for sample in range(2):
        assert_near(found[sample::2], own_logits(model, given, appended[sample::2]))


@torch.no_grad()
def test_in_bfloat16_they_are_as_near_to_float32_as_the_model(
    build: Make, batch: Make, bfloat16_products: None
) -> None:
    model, given = build("llama").eval(), batch()
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    appended = torch.randint(2, 64, (5, 2), generator=torch.Generator().manual_seed(3))
    steps = steps_of(copied, given)
    steps.step(appended[:, 0])
    found, exact = steps.step(appended[:, 1]), own_logits(model, given, appended)
    assert found.dtype == torch.bfloat16
    errors = [
        (each.float() - exact).norm() for each in (found, own_logits(copied, given, appended))
    ]
    assert 0 < errors[0] < 1.2 * errors[1]


@torch.no_grad()
def test_embeddings_and_norms_are_those_that_the_prompts_were_read_with(
    build: Make, batch: Make, bfloat16_products: None
) -> None:
    model, (ids, mask, _, _) = build("llama"), batch()
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    trained, rounded = decoder_of(model), decoder_of(copied)
    assert trained is not None
    assert rounded is not None
    read = read_prompts(trained, split_prompts(Tokens(ids, mask)), torch.bfloat16, rounded)
    steps = DecodingSteps(rounded, copied.lm_head, [read], 1, 6)
    found = steps.step(ids[:, -1])
    for norm in (copied.model.norm, copied.model.layers[0].input_layernorm):
        norm.weight.zero_()
    again = read_prompts(trained, split_prompts(Tokens(ids, mask)), torch.bfloat16, rounded)
    steps = DecodingSteps(rounded, copied.lm_head, [again], 1, 6)
    assert torch.equal(steps.step(ids[:, -1]), found)


def sampled(model: Any, given: Batch, samples: int, greedy: bool) -> Rollout:
    ids, mask, _, _ = given
    sampling = Sampling(max_new_tokens=12, completions_per_prompt=samples)
    numbers = None if greedy else row_uniforms(1, 0, list("abcde"), samples, 12)
    return generate_rollout(model, Tokens(ids, mask), sampling, numbers, list(range(10, 16)), 0)


@torch.no_grad()
def test_room_grows_as_it_is_needed(
    build: Make, batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_MORE", 2)
    model, given = build("llama").eval(), batch()
    steps = steps_of(model, given)
    appended = torch.randint(2, 64, (5, 6), generator=torch.Generator().manual_seed(3))
    for count in range(6):
        found = steps.step(appended[:, count])
        if count == 2:
            steps.keep(torch.tensor([1, 2, 4]))
            appended = appended[[1, 2, 4]]
    assert steps.keys[0].shape[2] == steps.longest == 26
    kept = tuple(each[[1, 2, 4]] for each in given)
    assert_near(found, own_logits(model, kept, appended))  # type: ignore[arg-type]


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_completions_are_those_of_the_plain_sampler(
    build: Make,
    batch: Make,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    greedy: bool,
    samples: int,
) -> None:
    model, given = build(kind), batch()
    counted = []
    call = DecodingSteps.step

    def spy(self: DecodingSteps, tokens: Tensor) -> Tensor:
        counted.append(len(tokens))
        return call(self, tokens)

    monkeypatch.setattr(DecodingSteps, "step", spy)
    ours = sampled(model, given, samples, greedy)
    assert len(counted) > 3
    assert model.training
    calls = len(counted)
    monkeypatch.setattr(decode_mode, "decoder_of", lambda _: None)
    plain = sampled(model, given, samples, greedy)
    assert len(counted) == calls
    assert torch.equal(ours.completion_ids, plain.completion_ids)
    assert torch.equal(ours.completion_mask, plain.completion_mask)
    assert torch.equal(ours.truncated, plain.truncated)
    torch.testing.assert_close(
        ours.sampled_log_probs, plain.sampled_log_probs, atol=1e-3, rtol=1e-3
    )


def test_bfloat16_weights_sample_as_the_same_weights_in_float32(
    build: Make, no_bfloat16_products: None
) -> None:
    model = build("llama").bfloat16()
    ids = torch.randint(2, 64, (3, 9), generator=torch.Generator().manual_seed(5))
    numbers = row_uniforms(3, 0, list("abc"), 1, 12)
    prompts = Tokens(ids, torch.ones_like(ids).bool())
    arguments = (prompts, Sampling(max_new_tokens=12), numbers, [1], 0)
    found = generate_rollout(model, *arguments)
    exact = generate_rollout(model.float(), *arguments)
    assert torch.equal(found.completion_ids, exact.completion_ids)
    assert torch.equal(found.sampled_log_probs, exact.sampled_log_probs)


def test_steps_are_plain_under_autocast_and_for_few_steps(
    build: Make, either_processor: bool
) -> None:
    model = build("llama")
    left = not either_processor  # autocast is left where it would be slow
    for autocast, steps, used in ((False, 12, True), (True, 12, left), (False, 3, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with decode_mode.decode_mode(model, 5, steps) as decoder:
                assert (decoder is not None) is used
