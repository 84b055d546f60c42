"""Prompts that were read for a rollout are as good as those that are read for the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.forward.fused import (
    ReadPrompts,
    completion_states,
    decoder_of,
    read_prompts,
)
from sdft_lightning.forward.fused.structure import Product
from sdft_lightning.forward.hidden import PromptCache, completion_hidden_states
from sdft_lightning.forward.layout import SplitPrompts, split_prompts
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.types import Tokens

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
Make = Callable[..., Any]
Found = tuple[Tensor, dict[str, Tensor]]


def read(model: Any, given: Batch, prefix: bool, keep: bool = True) -> ReadPrompts:
    ids, mask = given[:2]
    decoder = decoder_of(model)
    assert decoder is not None
    split = (
        split_prompts(Tokens(ids, mask)) if prefix else SplitPrompts(ids[0, :0], Tokens(ids, mask))
    )
    return read_prompts(decoder, split, torch.float32, keep=keep)


def gradients(model: Any, states: Tensor) -> Found:
    draw = torch.Generator().manual_seed(2)
    model.zero_grad()
    (states * torch.randn(states.shape, generator=draw)).sum().backward()
    trained = model.base_model.named_parameters()
    return states.detach(), {name: each.grad.clone() for name, each in trained}


def repeated(given: Batch, samples: int) -> Batch:
    """The prompts so many times, and so many completions of unequal lengths of each."""
    ids, mask, completion_ids, _ = given
    if samples == 1:
        return given
    draw = torch.Generator().manual_seed(5)
    completion_ids = torch.randint(2, 64, (5 * samples, 9), generator=draw)
    lengths = torch.randint(1, 10, (5 * samples, 1), generator=draw)
    prompts = [each.repeat_interleave(samples, dim=0) for each in (ids, mask)]
    return prompts[0], prompts[1], completion_ids, torch.arange(9) < lengths


def assert_same(ours: Found, theirs: Found, tolerance: float) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=tolerance, rtol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            ours[1][name] / scale, gradient / scale, atol=tolerance, rtol=0, msg=name
        )


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("prefix", [False, True])
def test_states_and_gradients_are_the_models(
    build: Make, batch: Make, kind: str, samples: int, prefix: bool
) -> None:
    model, given = build(kind), batch()
    rows = repeated(given, samples)
    keep = rows[3].clone()
    keep[1, 0] = False
    plain = completion_hidden_states(
        model, Tokens(*rows[:2]), Tokens(*rows[2:]), keep, pack=False, fuse=False
    )
    expected = gradients(model, plain)
    again = completion_hidden_states(
        model, Tokens(*rows[:2]), Tokens(*rows[2:]), keep, read=[read(model, given, prefix)]
    )
    assert_same(gradients(model, again), expected, 1e-4)


def test_what_was_read_is_not_computed_again(
    build: Make, batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = build("llama"), batch()
    tokens: list[tuple[int, int]] = []  # of each product: numbers that come out, rows
    multiply = Product.__call__

    def spy(self: Product, inputs: Tensor) -> Tensor:
        found = multiply(self, inputs)
        tokens.append((found.shape[1], len(inputs)))
        return found

    monkeypatch.setattr(Product, "__call__", spy)
    prompts = read(model, given, prefix=True)
    count = prompts.rows.ids.numel()
    heads, width, active = 64, 32, 96
    assert set(tokens) == {(heads, count), (width, count), (active, count), (active, 5), (width, 5)}
    tokens.clear()
    completion_hidden_states(
        model, Tokens(*given[:2]), Tokens(*given[2:]), given[3], read=[prompts]
    )
    fresh, wanted = int((given[3].sum(dim=1) - 1).sum()), int(given[3].sum())
    first, last = {(heads, fresh), (width, fresh), (active, fresh)}, {(active, wanted)}
    assert set(tokens) == first | last | {(width, wanted)}


def test_what_is_kept_is_given_away_layer_by_layer(build: Make, batch: Make) -> None:
    model = build("llama")
    prompts = read(model, batch(), prefix=True)
    full = prompts.nbytes
    sizes = []
    assert prompts.is_stored
    for place in range(3):
        prompts.layer(place)
        sizes.append(prompts.nbytes)
    assert full > sizes[0] > sizes[1] > sizes[2] == 0
    with pytest.raises(KeyError):
        prompts.layer(0)
    assert not prompts.is_stored
    assert read(model, batch(), prefix=True, keep=False).nbytes == 0


def test_other_prompts_than_were_read_are_computed_anew(build: Make, batch: Make) -> None:
    model, (ids, mask, completion_ids, completion_mask) = build("llama"), batch()
    other = ids.clone()
    other[:, -1] += 1
    prompts = read(model, (ids, mask, completion_ids, completion_mask), prefix=True)
    given = (other, mask, completion_ids, completion_mask)
    found = completion_hidden_states(
        model, Tokens(*given[:2]), Tokens(*given[2:]), completion_mask, read=[prompts]
    )
    plain = completion_hidden_states(
        model, Tokens(*given[:2]), Tokens(*given[2:]), completion_mask, fuse=False
    )
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    assert prompts.nbytes, "used up"


def test_in_bfloat16_they_are_those_of_a_pass_over_everything(
    build: Make, batch: Make, either_processor: bool
) -> None:
    model, given = build("llama"), batch()
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    decoder, rounded = decoder_of(model), decoder_of(copied) if either_processor else None
    assert decoder is not None
    split, keep = split_prompts(Tokens(*given[:2])), given[3]
    found = []
    for shares in (False, True):
        completions = Tokens(*given[2:])
        arguments = (decoder, split, completions, keep, torch.bfloat16, rounded)
        prompts = read_prompts(decoder, split, torch.bfloat16, rounded, keep=True)
        assert prompts.last.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            states = completion_states(*arguments, [prompts] if shares else [])
        found.append(gradients(model, states))
    assert_same(found[1], found[0], 2e-2)


def test_what_is_kept_in_another_dtype_is_not_used(
    build: Make, batch: Make, no_bfloat16_products: None
) -> None:
    model, given = build("llama"), batch()
    prompts = read(model, given, prefix=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = completion_hidden_states(
            model, Tokens(*given[:2]), Tokens(*given[2:]), given[3], read=[prompts]
        )
        plain = completion_hidden_states(model, Tokens(*given[:2]), Tokens(*given[2:]), given[3])
    assert torch.equal(found, plain)
    assert prompts.is_stored


def test_both_halves_are_kept_in_bfloat16(build: Make, batch: Make, either_processor: bool) -> None:
    decoder, given = decoder_of(build("llama")), batch()
    assert decoder is not None
    prompts = read_prompts(decoder, split_prompts(Tokens(*given[:2])), torch.bfloat16, keep=True)
    attention, mlp = prompts.layer(0)
    assert mlp is not None
    kept = [attention.out, *attention.products, *mlp.products]
    assert {each.dtype for each in kept} == {torch.bfloat16}
    assert mlp.out.dtype == attention.scale.dtype == torch.float32


def test_keys_and_states_are_the_models(build: Make, batch: Make) -> None:
    model, given = build("llama"), batch()
    prompts = read(model, given, prefix=True, keep=False)
    with torch.no_grad():
        own = model.model(input_ids=given[0][:1], use_cache=True)
    order, mask = prompts.rows.padded(20)
    assert torch.equal(mask, given[1])
    keys = prompts.keys[2][order[0]].transpose(0, 1)  # (K, L, E)
    layers = getattr(own, "cache", None) or own.past_key_values
    torch.testing.assert_close(keys, layers.layers[2].keys[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prompts.last[0], own.last_hidden_state[0, -1], atol=1e-4, rtol=1e-4)
    prompts.forget_keys()
    assert prompts.keys == prompts.values == []


@pytest.mark.parametrize("samples", [1, 3])
def test_prompts_of_a_frozen_model_are_stored_and_only_completions_are_computed(
    build: Make, batch: Make, kind: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = build(kind).eval(), batch()
    prompts = Tokens(*given[:2])
    completions = Tokens(*repeated(given, samples)[2:])
    keep = completions.mask.clone()
    keep[1, 0] = False
    plain = completion_hidden_states(model, prompts, completions, keep, fuse=False)
    tokens: list[int] = []
    multiply = Product.__call__

    def spy(self: Product, inputs: Tensor) -> Tensor:
        tokens.append(len(inputs))
        return multiply(self, inputs)

    monkeypatch.setattr(Product, "__call__", spy)
    cache = PromptCache()
    for again in (False, True):
        tokens.clear()
        found = completion_hidden_states(model, prompts, completions, keep, cache=cache)
        assert not found.requires_grad
        torch.testing.assert_close(found, plain.detach(), atol=1e-4, rtol=1e-4)
        fresh = int((completions.mask.sum(dim=1) - 1).sum())
        wanted = int(keep[:, 1:].sum())  # the first is predicted by the prompt
        layers = len(model.model.layers)
        of_completions = [fresh, fresh, fresh, fresh] * (layers - 1) + [fresh, fresh] + [wanted] * 2
        assert tokens[-4 * layers :] == of_completions
        assert (len(tokens) == 4 * layers) is again
    # In another order and number, each row is still its own.
    rows = [4, 1]
    place = [row * samples + sample for row in rows for sample in range(samples)]
    some = completion_hidden_states(
        model, prompts.rows(rows), completions.rows(place), keep[place], cache=cache
    )
    starts = [0, *keep.sum(dim=1).cumsum(dim=0).tolist()]
    expected = torch.cat([plain[starts[row] : starts[row + 1]] for row in place])
    torch.testing.assert_close(some, expected.detach(), atol=1e-4, rtol=1e-4)


def test_a_stored_prompt_is_enough_for_a_completion_of_one_token(build: Make, batch: Make) -> None:
    model, given = build("llama").eval(), batch()
    prompts, completions = Tokens(*given[:2]), Tokens(given[2][:, :1], given[3][:, :1])
    keep = completions.mask
    plain = completion_hidden_states(model, prompts, completions, keep, fuse=False)
    for fuse in (True, False):
        found = completion_hidden_states(
            model, prompts, completions, keep, fuse=fuse, cache=PromptCache()
        )
        torch.testing.assert_close(found, plain.detach(), atol=1e-4, rtol=1e-4)
