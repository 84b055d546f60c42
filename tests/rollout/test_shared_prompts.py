"""Which prompts a rollout keeps for the student, and that it goes on from them as from others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.rollout import Sampling, generate_rollout, student
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.rollout.student import SamplingWeights, SharedPrompts
from sdft_lightning.types import Tokens

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.fixture
def prompts() -> list[tuple[str, tuple[Tensor, Tensor]]]:
    """Three micro-batches of two prompts, of unequal widths."""
    draw = torch.Generator().manual_seed(4)
    found = []
    for key, width in (("a", 12), ("b", 9), ("c", 14)):
        ids = torch.randint(2, 60, (2, width), generator=draw)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, :3] = False
        found.append((key, Tokens(ids, mask)))
    return found


def joined(prompts: Any) -> tuple[Tensor, Tensor]:
    width = max(ids.shape[1] for _, (ids, _) in prompts)
    parts = [
        [torch.nn.functional.pad(each, (width - each.shape[1], 0)) for each in pair]
        for _, pair in prompts
    ]
    return torch.cat([ids for ids, _ in parts]), torch.cat([mask for _, mask in parts])


@pytest.mark.parametrize("samples", [1, 2])
def test_completions_are_the_same_as_from_prompts_that_are_read_anew(
    model: Any, prompts: Any, samples: int
) -> None:
    sampling = Sampling(max_new_tokens=10, completions_per_prompt=samples)
    numbers = row_uniforms(1, 0, list("uvwxyz"), samples, 10)
    read = SharedPrompts().read(model, model, prompts, samples, 10)
    assert read is not None
    assert [len(part.rows.owner) for part in read] == [2, 2, 2]
    found = [
        generate_rollout(model, Tokens(*joined(prompts)), sampling, numbers, [7], 0, read=each)
        for each in (None, read)
    ]
    assert torch.equal(found[0].completion_ids, found[1].completion_ids)
    torch.testing.assert_close(
        found[0].sampled_log_probs, found[1].sampled_log_probs, atol=1e-4, rtol=1e-4
    )
    assert all(part.keys == [] for part in read), "keys and values are held twice"


@pytest.mark.parametrize(("most", "kept"), [(2**30, "abc"), (0, "a"), (1.5, "ab")])
def test_what_is_kept_for_later_micro_batches_is_bounded(
    model: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, most: float, kept: str
) -> None:
    shared = SharedPrompts()
    first = shared.read(model, model, prompts[:1], 1, 10)
    assert first is not None
    limit = int(most * first[0].nbytes) if most == 1.5 else int(most)
    monkeypatch.setattr(student, "_MOST_BYTES", limit)
    read = shared.read(model, model, prompts, 1, 10)
    assert read is not None
    assert len(read) == 3
    for key, part in zip("abc", read, strict=True):
        assert shared.take(key, model) is (part if key in kept else None)
        assert bool(part.nbytes) is (key in kept)
        assert shared.take(key, model) is None, "given twice"


def test_a_new_window_leaves_nothing_of_the_one_before(model: Any, prompts: Any) -> None:
    shared = SharedPrompts()
    shared.read(model, model, prompts, 1, 10)
    shared.read(model, model, prompts[1:2], 1, 10)
    assert [shared.take(key, model) is None for key in "abc"] == [True, False, True]
    shared.read(model, model, prompts, 1, 10)
    shared.forget()
    assert shared.take("a", model) is None


def test_what_other_weights_have_computed_is_void(model: Any, prompts: Any) -> None:
    shared = SharedPrompts()
    shared.read(model, model, prompts, 1, 10)
    assert shared.take("a", model) is not None
    with torch.no_grad():
        model.model.norm.weight.mul_(1.0)
    assert shared.take("b", model) is None


class Hook:
    """Does nothing, but would have to be called."""

    def __call__(self, *arguments: Any) -> None:
        return None


def test_a_bfloat16_student_shares_them_where_it_is_multiplied_in_float32(
    model: Any, prompts: Any, either_processor: bool
) -> None:
    student = copy.deepcopy(model).bfloat16()
    read = SharedPrompts().read(student, student, prompts, 1, 10)
    assert (read is None) is either_processor


@pytest.mark.parametrize(
    "case", ["shared", "copy", "copy_autocast", "same_autocast", "many_rows", "few_steps", "hook"]
)
def test_they_are_shared_where_student_and_sampler_multiply_alike(
    model: Any, prompts: Any, bfloat16_products: None, case: str
) -> None:
    sampler = model
    if case.startswith("copy"):
        sampler = SamplingWeights("bfloat16").model(model, 0)
    rows, steps = (40 if case == "many_rows" else 1), (4 if case == "few_steps" else 10)
    handle = model.model.layers[0].register_forward_hook(Hook()) if case == "hook" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=case.endswith("autocast")):
        read = SharedPrompts().read(model, sampler, prompts, rows, steps)
    if handle is not None:
        handle.remove()
    assert (read is not None) is (case in ("shared", "copy_autocast"))
