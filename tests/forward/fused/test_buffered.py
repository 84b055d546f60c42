"""Steps on buffers made beforehand give the logits of the model itself, on the CPU here."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.fused import (
    BufferedSteps,
    buffered_parts,
    choose_decoding_,
    decoding,
    decoding_kind,
)
from sdft_lightning.forward.fused.structure import parts_of
from sdft_lightning.forward.kv_cache import CachedSteps, FilledCache
from sdft_lightning.forward.layout import behind_prefix, split_prompts
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.rollout import Sampling, decode, decode_mode, generate_rollout
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import Rollout, Tokens

Make = Callable[..., Any]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[BufferedSteps]:
    """Take steps on buffers on the CPU, too; those that are made."""
    made: list[BufferedSteps] = []

    class Seen(BufferedSteps):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(decoding, "_BUFFERED_ON", ("cpu",))
    monkeypatch.setattr(decode_mode, "can_pack", lambda *args: False)  # else fused steps
    monkeypatch.setattr(decode, "BufferedSteps", Seen)
    return made


def steps_of(
    model: Any, given: Batch, samples: int = 1, graphs: bool = False, steps: int = 6
) -> BufferedSteps:
    ids, mask, _, _ = given
    read = CachedSteps(model, "masked", behind_prefix(model, split_prompts(Tokens(ids, mask))))
    parts = parts_of(model)
    assert parts is not None
    filled = FilledCache(read.cache, read.mask, read.logits)
    return BufferedSteps(parts, model.lm_head, filled, samples, steps, graphs)


def own_logits(model: Any, given: Batch, appended: Tensor) -> Tensor:
    """Of the model itself, row by row without padding or cache."""
    ids, mask, _, _ = given
    rows = [
        torch.cat([each[kept], more]) for each, kept, more in zip(ids, mask, appended, strict=True)
    ]
    return torch.stack([model(input_ids=row.unsqueeze(0)).logits[0, -1] for row in rows])


def some_tokens(rows: int, count: int) -> Tensor:
    return torch.randint(2, 64, (rows, count), generator=torch.Generator().manual_seed(3))


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_step_gives_the_models_logits_also_where_buffers_grow(
    build: Make, batch: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_MORE_COLUMNS", 2)
    monkeypatch.setattr(decoding, "_ALIGNED", 1)
    model, given = build(kind).eval(), batch()
    steps, appended = steps_of(model, given), some_tokens(5, 6)
    assert_near(steps.logits, own_logits(model, given, appended[:, :0]))
    sizes = []
    for count in range(6):
        found = steps.step(appended[:, count])
        assert_near(found, own_logits(model, given, appended[:, : count + 1]))
        sizes.append(steps.keys[0].shape[2])
    assert sizes == [22, 22, 24, 24, 26, 26]


@torch.no_grad()
def test_rows_that_are_left_go_on_as_before(build: Make, batch: Make) -> None:
    model, given = build("qwen2").eval(), batch()
    steps, appended = steps_of(model, given), some_tokens(5, 3)
    steps.step(appended[:, 0])
    steps.keep(torch.tensor([1, 4]))
    steps.step(appended[[1, 4], 1])
    steps.keep(torch.tensor([1]))
    assert_near(steps.step(appended[[4], 2]), own_logits(model, given, appended)[[4]])
    assert steps.keys[0].shape[0] == 1  # the memory of the others is free


@torch.no_grad()
def test_samples_of_a_prompt_stand_together(build: Make, batch: Make) -> None:
    model, given = build("llama").eval(), batch()
    steps, appended = steps_of(model, given, samples=2), some_tokens(10, 1)
    found = steps.step(appended[:, 0])
    for sample in range(2):
        assert_near(found[sample::2], own_logits(model, given, appended[sample::2]))


@torch.no_grad()
def test_keys_are_never_repeated_for_their_queries(
    build: Make, batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    attend = decoding.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.extend((tuple(query.shape), tuple(key.shape), key.untyped_storage().nbytes()))
        return attend(query, key, value, **options)

    monkeypatch.setattr(decoding, "scaled_dot_product_attention", watched)
    model, given = build("llama").eval(), batch()
    steps = steps_of(model, given)
    buffer = steps.keys[0]
    steps.step(some_tokens(5, 1)[:, 0])
    assert seen[:2] == [(5, 2, 2, 8), tuple(buffer.shape)]  # rows, keys, queries of each, numbers
    assert seen[2] == buffer.untyped_storage().nbytes()
    assert steps.keys[0] is buffer


@torch.no_grad()
def test_in_bfloat16_they_are_as_near_to_float32_as_the_model(build: Make, batch: Make) -> None:
    model, given = build("llama").eval(), batch()
    appended = some_tokens(5, 2)
    exact = own_logits(model, given, appended)
    rounded = copy.deepcopy(model).bfloat16()
    rounded.model.rotary_emb = model.model.rotary_emb
    steps = steps_of(rounded, given)
    steps.step(appended[:, 0])
    found = steps.step(appended[:, 1])
    assert found.dtype == torch.bfloat16
    errors = [
        (each.float() - exact).norm() for each in (found, own_logits(rounded, given, appended))
    ]
    assert 0 < errors[0] < 1.2 * errors[1]


def rollout(model: Any, given: Batch, stops: list[int]) -> Rollout:
    ids, mask, _, _ = given
    numbers = row_uniforms(0, 0, [str(row) for row in range(5)], 2, 12)
    sampling = Sampling(max_new_tokens=12, completions_per_prompt=2)
    return generate_rollout(model, Tokens(ids, mask), sampling, numbers, stops, 0)


def test_completions_are_those_of_the_models_own_calls(
    build: Make, batch: Make, kind: str, on_cpu: list[BufferedSteps]
) -> None:
    model, given, stops = build(kind), batch(), list(range(2, 9))
    found = rollout(model, given, stops)
    assert len(on_cpu) == 1
    choose_decoding_(model, "transformers")
    own = rollout(model, given, stops)
    assert len(on_cpu) == 1
    assert len(own.completion_mask.sum(dim=1).unique()) > 2  # rows were dropped on the way
    assert torch.equal(found.completion_ids, own.completion_ids)
    torch.testing.assert_close(found.sampled_log_probs, own.sampled_log_probs, atol=1e-4, rtol=1e-4)


def pointers(steps: BufferedSteps) -> list[int]:
    """Where all lies that a step reads and writes."""
    own = (steps.tokens, steps.column, steps.positions, steps.unseen)
    return [each.data_ptr() for each in (*own, *steps.keys, *steps.values)]


@torch.no_grad()
def test_a_graph_is_replayed_while_buffers_stay_and_recorded_anew_behind_that(
    build: Make, batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_MORE_COLUMNS", 8)
    monkeypatch.setattr(decoding, "_EAGER_STEPS", 1)
    recorded: list[list[int]] = []
    replays: list[int] = []

    def stand_in(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        places = pointers(steps)
        recorded.append(places)
        compute()  # what is recorded is not computed, or may be: it writes what is there

        def replay() -> Tensor:
            assert pointers(steps) == places
            replays.append(steps.length)
            return compute()

        return replay

    monkeypatch.setattr(decoding, "_recorded", stand_in)
    model, given = build("llama").eval(), batch()
    appended = some_tokens(5, 14)
    steps = steps_of(model, given, graphs=True, steps=14)
    rows = torch.arange(5)
    for count in range(14):
        if count == 5:
            rows = rows[[0, 3]]
            steps.keep(torch.tensor([0, 3]))
        found = steps.step(appended[rows, count])
        assert_near(found, own_logits(model, given, appended[:, : count + 1])[rows])
    # Rows of 20 tokens, buffers of 32 and 40 columns: the first step of each shape is no replay.
    assert replays == [21, 22, 23, 24, 26, 27, 28, 29, 30, 31, 33]
    assert len(recorded) == 3


@torch.no_grad()
def test_where_no_graph_can_be_recorded_steps_go_on_without(
    build: Make, batch: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(compute: Any) -> Any:
        raise RuntimeError("capture is not permitted")

    monkeypatch.setattr(decoding, "_recorded", refused)
    monkeypatch.setattr(decoding, "_EAGER_STEPS", 0)
    model, given = build("llama").eval(), batch()
    steps, appended = steps_of(model, given, graphs=True), some_tokens(5, 2)
    with caplog.at_level(logging.WARNING):
        steps.step(appended[:, 0])
        found = steps.step(appended[:, 1])
    assert_near(found, own_logits(model, given, appended))
    assert caplog.text.count("capture is not permitted") == 1
    assert "--model.policy.decoding=eager" in caplog.text


def windowed(model: Any) -> None:
    model.config.sliding_window = 4


def hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def mixed(model: Any) -> None:
    model.model.norm.bfloat16()


def as_transformers(model: Any) -> None:
    choose_decoding_(model, "transformers")


@pytest.mark.parametrize("change", [windowed, hooked, mixed, as_transformers])
def test_other_models_are_left_to_transformers(
    build: Make, on_cpu: list[BufferedSteps], change: Callable[[Any], None]
) -> None:
    model = build("llama").eval()
    assert buffered_parts(model) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert buffered_parts(model) is None
    change(model)
    assert buffered_parts(model) is None


def test_a_cpu_takes_none_by_itself(build: Make) -> None:
    assert buffered_parts(build("llama").eval()) is None


def test_the_policy_says_how_a_model_and_its_copies_decode(model_folder: Any) -> None:
    model = load_policy(Policy(str(model_folder), decoding="eager")).model
    assert decoding_kind(copy.deepcopy(model)) == "eager"
    assert decoding_kind(load_policy(Policy(str(model_folder))).model) == "graphs"
    with pytest.raises(UserError, match=r"model\.policy\.decoding: got 'fast', allowed are graphs"):
        Policy(decoding="fast")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_graphs_give_the_logits_of_steps_without(
    build: Make, batch: Make, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_EAGER_STEPS", 1)
    monkeypatch.setattr(decoding, "_MORE_COLUMNS", 8)
    model = build(kind).eval().to("cuda", dtype)
    ids, mask, *rest = (part.cuda() for part in batch())
    appended = some_tokens(5, 14).cuda()
    both = [steps_of(model, (ids, mask, *rest), 1, graphs, 14) for graphs in (True, False)]
    for count in range(14):
        if count == 5:
            appended = appended[[0, 3]]
            for steps in both:
                steps.keep(torch.tensor([0, 3], device="cuda"))
        with_graph, without = (steps.step(appended[:, count]) for steps in both)
        torch.testing.assert_close(with_graph, without)
    assert both[0]._replay is not None
    if dtype == torch.float32:
        plain = own_logits(model, tuple(part[[0, 3]] for part in (ids, mask, *rest)), appended)  # type: ignore[arg-type]
        torch.testing.assert_close(without, plain, atol=1e-3, rtol=1e-3)
