"""What decoding has computed of completions is what the student's pass would compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.forward.fused import ReadPrompts, decoder_of, read_prompts, reuse
from sdft_lightning.forward.fused.structure import Product
from sdft_lightning.forward.hidden import completion_hidden_states
from sdft_lightning.forward.layout import split_if_worth
from sdft_lightning.rollout import RolloutRequest, Sampling, StudentPasses, generate_rollout
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import Rollout, Tokens

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
Make = Callable[..., Any]
NEW_TOKENS = 12

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


def sampled(
    model: Any, given: Batch, samples: int, pieces: list[int], keep: int
) -> tuple[Rollout, list[ReadPrompts]]:
    """Completions of unequal lengths; the prompts in pieces, of which the first ones are kept."""
    ids, mask = given[:2]
    decoder = decoder_of(model)
    assert decoder is not None
    parts = zip(ids.split(pieces), mask.split(pieces), strict=True)
    read = [
        read_prompts(decoder, split_if_worth(Tokens(*part)), torch.float32, keep=place < keep)
        for place, part in enumerate(parts)
    ]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, completions_per_prompt=samples)
    numbers = row_uniforms(3, 0, list("abcde"), samples, NEW_TOKENS)
    stops = list(range(10, 16))
    rollout = generate_rollout(model, Tokens(ids, mask), sampling, numbers, stops, 0, read=read)
    lengths = rollout.completion_mask.sum(dim=1)
    assert len(lengths.unique()) > 2, "of one length they would show little"
    return rollout, read


def states_and_gradients(
    model: Any, given: Batch, rollout: Rollout, samples: int, rows: slice, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    prompts = [each.repeat_interleave(samples, dim=0)[rows] for each in given[:2]]
    ids, mask = rollout.completion_ids[rows], rollout.completion_mask[rows]
    width = int(mask.sum(dim=1).max())
    ids, mask = ids[:, :width], mask[:, :width]
    states = completion_hidden_states(model, Tokens(*prompts), Tokens(ids, mask), mask, **options)
    draw = torch.Generator().manual_seed(2)
    model.zero_grad()
    (states * torch.randn(states.shape, generator=draw)).sum().backward()
    trained = model.base_model.named_parameters()
    return states.detach(), {name: each.grad.clone() for name, each in trained}


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
    for name, gradient in theirs[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            ours[1][name] / scale, gradient / scale, atol=1e-4, rtol=0, msg=name
        )


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("pieces", [[5], [2, 1, 2]])
def test_states_and_gradients_are_the_models_and_nothing_is_computed_twice(
    build: Make,
    batch: Make,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    samples: int,
    pieces: list[int],
) -> None:
    model, given = build(kind), batch()
    rollout, read = sampled(model, given, samples, pieces, keep=3)
    counted: list[int] = []
    multiply = Product.__call__

    def spy(self: Product, inputs: Tensor) -> Tensor:
        counted.append(len(inputs))
        return multiply(self, inputs)

    monkeypatch.setattr(Product, "__call__", spy)
    start = 0
    for part in read:
        rows = slice(start, start + samples * len(part.rows.owner))
        plain = states_and_gradients(model, given, rollout, samples, rows, fuse=False)
        counted.clear()
        found = states_and_gradients(model, given, rollout, samples, rows, read=[part])
        assert_same(found, plain)
        # The last layer's MLP is made of the wanted tokens in any case.
        assert counted == [int(rollout.completion_mask[rows].sum())] * 2
        assert part.nbytes == 0
        start = rows.stop


@pytest.mark.parametrize("most", [0, 10**9])
def test_later_micro_batches_are_recorded_while_they_fit(
    build: Make, batch: Make, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(reuse, "MOST_BYTES", most)
    model, given = build("llama"), batch()
    rollout, read = sampled(model, given, 2, [2, 2, 1], keep=2)
    assert [part.completions is not None for part in read] == [True, most > 0, False]
    start = 0
    for part in read[:2]:
        rows = slice(start, start + 4)
        plain = states_and_gradients(model, given, rollout, 2, rows, fuse=False)
        assert_same(states_and_gradients(model, given, rollout, 2, rows, read=[part]), plain)
        start += 4
    assert not read[2].is_stored


@pytest.mark.parametrize("change", ["token", "longer", "exchanged", "prompts"])
def test_what_was_changed_afterwards_is_computed_anew(
    build: Make, batch: Make, change: str
) -> None:
    model, given = build("llama"), batch()
    rollout, (part,) = sampled(model, given, 1, [5], keep=1)
    ids, mask = rollout.completion_ids.clone(), rollout.completion_mask.clone()
    lengths = mask.sum(dim=1)
    if change == "token":
        ids[0, 0] = 63 - ids[0, 0]
    elif change == "longer":
        row = int((lengths + 100 * (lengths == lengths.max())).argmin())
        mask[row, lengths[row]] = True
    elif change == "exchanged":
        ids, mask = ids.flip(0), mask.flip(0)
    else:
        given = (given[0].flip(0), given[1].flip(0), *given[2:])
    rollout = rollout._replace(completion_ids=ids, completion_mask=mask)
    rows = slice(0, 5)
    plain = states_and_gradients(model, given, rollout, 1, rows, fuse=False)
    assert_same(states_and_gradients(model, given, rollout, 1, rows, read=[part]), plain)


def test_prompts_that_are_not_kept_are_not_recorded(build: Make, batch: Make) -> None:
    _, (part,) = sampled(build("llama"), batch(), 1, [5], keep=0)
    assert not part.is_stored
    assert part.completions is None


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bfloat16_gradients_are_as_near_to_float32_as_those_of_a_pass_of_its_own(
    build: Make, batch: Make, kind: str, either_processor: bool, weights: torch.dtype
) -> None:
    if either_processor and weights == torch.bfloat16:
        pytest.skip("such a model is not fused where bfloat16 is multiplied")
    model, (ids, mask, _, _) = build(kind).to(weights), batch()
    # Where products are float32, there is nothing to be gained from a copy.
    copied = StudentPasses("bfloat16").at(model, 0).sampler() if either_processor else model
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    numbers = row_uniforms(3, 0, list("abcde"), 1, NEW_TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        request = RolloutRequest(Tokens(ids, mask), list("abcde"), sampling, 3, 0, [10], 0)
        read = StudentPasses().at(model, 0)._read(copied, [request])
        rollout = generate_rollout(copied, Tokens(ids, mask), sampling, numbers, [10], 0, read=read)
    assert read is not None
    assert read[0].completions is not None, "nothing was recorded"
    halves = read[0]._layers[1]
    assert {each.dtype for half in halves if half for each in half.products} == {torch.bfloat16}
    given = (ids, mask, rollout.completion_ids, rollout.completion_mask)
    rows = slice(0, 5)
    exact = states_and_gradients(copy.deepcopy(model).float(), given, rollout, 1, rows, fuse=False)
    errors = []
    for options in ({"read": read}, {}):
        with torch.autocast("cpu", torch.bfloat16):
            found = states_and_gradients(model, given, rollout, 1, rows, rounded=copied, **options)
        errors.append(distance(found, exact))
    assert 0 < errors[0] < 1.2 * errors[1]


def distance(found: Any, exact: Any) -> float:
    """Of all gradients together, relative to the exact ones."""
    both = [torch.cat([each.flatten() for each in one[1].values()]) for one in (found, exact)]
    return float((both[0] - both[1]).norm() / both[1].norm())
