"""What a student's passes store while sampling, and that they use it only where it is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.forward.fused.structure import Product
from sdft_lightning.forward.hidden import completion_hidden_states
from sdft_lightning.rollout import RolloutRequest, Sampling, generate_rollout, student
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.types import Rollout, Tokens

STOPS = list(range(7, 272, 7))  # so that rows end at different lengths

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


def requests_of(samples: int = 1, steps: int = 10) -> list[RolloutRequest]:
    """Three micro-batches of two prompts, of unequal widths."""
    draw = torch.Generator().manual_seed(4)
    sampling = Sampling(max_new_tokens=steps, completions_per_prompt=samples)
    found = []
    for row_ids, width in (("uv", 12), ("wx", 9), ("yz", 14)):
        ids = torch.randint(2, 60, (2, width), generator=draw)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, :3] = False
        found.append(RolloutRequest(Tokens(ids, mask), list(row_ids), sampling, 1, 0, STOPS, 0))
    return found


def passes_of(model: Any) -> StudentPasses:
    return StudentPasses("same").at(model, 0)


def joined(requests: list[RolloutRequest]) -> Tokens:
    width = max(each.prompts.ids.shape[1] for each in requests)
    parts = [
        [torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in each.prompts]
        for each in requests
    ]
    return Tokens(torch.cat([ids for ids, _ in parts]), torch.cat([mask for _, mask in parts]))


@pytest.mark.parametrize("samples", [1, 2])
def test_completions_are_the_same_as_from_prompts_that_are_read_anew(
    model: Any, samples: int
) -> None:
    requests = requests_of(samples)
    numbers = row_uniforms(1, 0, list("uvwxyz"), samples, 10)
    read = passes_of(model)._read(model, requests)
    assert read is not None
    assert [len(part.rows.owner) for part in read] == [2, 2, 2]
    sampling = requests[0].sampling
    found = [
        generate_rollout(model, joined(requests), sampling, numbers, STOPS, 0, read=each)
        for each in (None, read)
    ]
    assert torch.equal(found[0].completion_ids, found[1].completion_ids)
    torch.testing.assert_close(
        found[0].sampled_log_probs, found[1].sampled_log_probs, atol=1e-4, rtol=1e-4
    )
    assert all(part.keys == [] for part in read), "keys and values are held twice"


@pytest.mark.parametrize("samples", [1, 2])
def test_each_micro_batch_gets_the_completions_that_it_has_alone(model: Any, samples: int) -> None:
    requests = requests_of(samples)
    together = passes_of(model).sample(requests)
    assert len({rollout.completion_ids.shape[1] for rollout in together}) > 1
    for request, found in zip(requests, together, strict=True):
        (alone,) = passes_of(model).sample([request])
        assert torch.equal(found.completion_ids, alone.completion_ids)
        assert torch.equal(found.completion_mask, alone.completion_mask)


def test_requests_of_unequal_length_are_sampled_at_once_each_as_alone(
    model: Any, computed: list[int]
) -> None:
    short, *others = requests_of()
    requests = [
        short._replace(sampling=Sampling(max_new_tokens=2)),
        others[0],
        others[1]._replace(sampling=Sampling(max_new_tokens=5)),
    ]
    requests = [each._replace(stop_ids=[]) for each in requests]
    passes = passes_of(model)
    together = passes.sample(requests)
    assert [tuple(each.completion_ids.shape) for each in together] == [(2, 2), (2, 10), (2, 5)]
    for request, found in zip(requests, together, strict=True):
        (alone,) = passes_of(model).sample([request])
        assert torch.equal(found.completion_ids, alone.completion_ids)
        assert torch.equal(found.completion_mask, alone.completion_mask)
        assert found.truncated.all()
        assert alone.truncated.all()
    for request, rollout in zip(requests, together, strict=True):
        computed.clear()
        found = passes.hidden(request.prompts, rollout.completions, rollout.completion_mask)
        assert computed == [int(rollout.completion_mask.sum())] * 2  # the last layer's MLP alone
        assert_same_states(found, model, request.prompts, rollout)


def test_a_stop_token_at_a_rows_own_last_place_is_not_truncated(model: Any) -> None:
    requests = requests_of(steps=3)
    requests = [each._replace(stop_ids=[]) for each in requests]
    third = [int(each.completion_ids[0, 2]) for each in passes_of(model).sample(requests)]
    longer = [*requests[:2], requests[2]._replace(sampling=Sampling(max_new_tokens=9))]
    ended = passes_of(model).sample([each._replace(stop_ids=third[:1]) for each in longer])
    assert not ended[0].truncated[0]
    assert ended[0].completion_ids[0].tolist()[-1] == third[0]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each product of fused blocks."""
    counted: list[int] = []
    multiply = Product.__call__

    def spy(self: Product, inputs: Tensor) -> Tensor:
        counted.append(len(inputs))
        return multiply(self, inputs)

    monkeypatch.setattr(Product, "__call__", spy)
    return counted


def assert_same_states(found: Tensor, model: Any, prompts: Tokens, rollout: Rollout) -> None:
    keep = rollout.completion_mask
    plain = completion_hidden_states(model, prompts, rollout.completions, keep, fuse=False)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("samples", [1, 2])
def test_what_was_sampled_is_found_by_its_tokens_in_any_order_and_computed_once(
    model: Any, computed: list[int], samples: int
) -> None:
    passes, requests = passes_of(model), requests_of(samples)
    rollouts = passes.sample(requests)
    for place in (2, 0, 1):
        prompts, rollout = requests[place].prompts, rollouts[place]
        computed.clear()
        found = passes.hidden(prompts, rollout.completions, rollout.completion_mask)
        # The last layer's MLP is made of the wanted tokens in any case.
        assert computed == [int(rollout.completion_mask.sum())] * 2
        assert_same_states(found, model, prompts, rollout)
    assert passes._stored == []


CHANGES: dict[str, Callable[[StudentPasses, Any], Any]] = {
    "weights": lambda passes, model: _scale_(model),
    "step": lambda passes, model: passes.at(model, 1),
    "model": lambda passes, model: passes.at(copy.deepcopy(model), 0),
    "forgotten": lambda passes, model: passes.forget(),
}


@torch.no_grad()
def _scale_(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


@pytest.mark.parametrize("change", [*CHANGES, "prompt", "completion"])
def test_whatever_has_changed_is_computed_anew(
    model: Any, computed: list[int], change: str
) -> None:
    passes, (request, *_) = passes_of(model), requests_of()
    (rollout,) = passes.sample([request])
    prompts = request.prompts
    if change == "prompt":
        prompts = Tokens(prompts.ids.flip(0), prompts.mask.flip(0))
    elif change == "completion":
        ids = rollout.completion_ids.clone()
        ids[0, 0] = 6 if ids[0, 0] == 5 else 5
        rollout = rollout._replace(completion_ids=ids)
    else:
        CHANGES[change](passes, model)
    computed.clear()
    found = passes.hidden(prompts, rollout.completions, rollout.completion_mask)
    assert len(computed) > 2, "taken from other tokens or weights"
    assert_same_states(found, model, prompts, rollout)


@pytest.mark.parametrize(("most", "kept"), [(2**30, "abc"), (0, "a"), (1.5, "ab")])
def test_what_is_stored_for_later_micro_batches_is_bounded(
    model: Any, monkeypatch: pytest.MonkeyPatch, most: float, kept: str
) -> None:
    passes, requests = passes_of(model), requests_of()
    first = passes._read(model, requests[:1])
    assert first is not None
    limit = int(most * first[0].nbytes) if most == 1.5 else int(most)
    monkeypatch.setattr(student, "MOST_BYTES", limit)
    read = passes._read(model, requests)
    assert read is not None
    assert len(read) == 3
    assert passes._stored == read[: len(kept)]
    assert [bool(part.nbytes) for part in read] == [key in kept for key in "abc"]


def test_a_new_window_leaves_nothing_of_the_one_before(model: Any) -> None:
    passes, requests = passes_of(model), requests_of()
    passes.sample(requests)
    assert len(passes._stored) == 3
    passes.sample(requests[1:2])
    assert [part.rows.token_lists() for part in passes._stored] == [requests[1].prompts.lists()]
    passes.forget()
    assert passes._stored == []


def test_without_gradients_nothing_is_stored(model: Any) -> None:
    passes = passes_of(model)
    with torch.no_grad():
        passes.sample(requests_of())
    assert passes._stored == []


class Hook:
    """Does nothing, but would have to be called."""

    def __call__(self, *arguments: Any) -> None:
        return None


def test_a_bfloat16_student_shares_them_where_it_is_multiplied_in_float32(
    model: Any, either_processor: bool
) -> None:
    low = copy.deepcopy(model).bfloat16()
    read = passes_of(low)._read(low, requests_of())
    assert (read is None) is either_processor


@pytest.mark.parametrize(
    "case", ["shared", "copy", "copy_autocast", "same_autocast", "many_rows", "few_steps", "hook"]
)
def test_they_are_shared_where_student_and_sampler_multiply_alike(
    model: Any, bfloat16_products: None, case: str
) -> None:
    passes = StudentPasses("bfloat16" if case.startswith("copy") else "same").at(model, 0)
    sampler = passes.sampler()
    samples, steps = (40 if case == "many_rows" else 1), (4 if case == "few_steps" else 10)
    handle = model.model.layers[0].register_forward_hook(Hook()) if case == "hook" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=case.endswith("autocast")):
        read = passes._read(sampler, requests_of(samples, steps))
    if handle is not None:
        handle.remove()
    assert (read is not None) is (case in ("shared", "copy_autocast"))
