"""Completions that belong to their row: greedy as transformers', sampled alike in any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward import layout
from sdft_lightning.forward.fused import DecodingSteps
from sdft_lightning.rollout import Sampling, generate, generate_rollout, greedy_rollout
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import Rollout, Tokens

Pad = Callable[..., tuple[Tensor, Tensor]]

PROMPTS = [
    [20, 21, 22],
    [30, 31, 32, 33, 34, 35, 36],
    [40],
    [50, 51, 52, 53, 54],
    [60, 61],
    [70, 71, 72, 73],
]
ROWS = [f"row-{i}" for i in range(len(PROMPTS))]
STOPS = list(range(100, 140))  # many, so that rows end at different steps
PAD = 2


def sample(
    model: Any, pad: Pad, rows: list[int], sampling: Sampling, stops: list[int] = STOPS
) -> list[tuple[list[int], bool]]:
    """Completion and truncated flag of each of these prompts, sampled in one batch."""
    ids, mask = pad([PROMPTS[row] for row in rows])
    names = [ROWS[row] for row in rows]
    samples = sampling.completions_per_prompt
    numbers = row_uniforms(1, 0, names, samples, sampling.max_new_tokens)
    return completions(generate_rollout(model, Tokens(ids, mask), sampling, numbers, stops, PAD))


def completions(rollout: Rollout) -> list[tuple[list[int], bool]]:
    pairs = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    texts = [ids[mask].tolist() for ids, mask in pairs]
    return list(zip(texts, rollout.truncated.tolist(), strict=True))


EVERY = list(range(len(PROMPTS)))
SAMPLING = Sampling(max_new_tokens=16)


def free_greedy(model: Any, pad: Pad) -> Tensor:
    """Greedy completions that nothing stops."""
    ids, mask = pad(PROMPTS)
    return greedy_rollout(model, Tokens(ids, mask), 10, [271], PAD).completion_ids


def test_greedy_equals_that_of_transformers_token_by_token(model: Any, pad_left: Pad) -> None:
    free = free_greedy(model, pad_left)
    stops = sorted({int(free[0, 2]), int(free[3, 4]), int(free[4, 7])})
    ids, mask = pad_left(PROMPTS, PAD)
    mine = greedy_rollout(model, Tokens(ids, mask), 10, stops, PAD)
    theirs = model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        do_sample=False,
        max_new_tokens=10,
        eos_token_id=stops,
        pad_token_id=PAD,
    )[:, ids.shape[1] :]
    assert mine.completion_ids.tolist() == theirs.tolist()
    lengths = mine.completion_mask.sum(dim=1)
    assert lengths[0] <= 3
    assert lengths.unique().numel() > 1


def test_the_first_stop_token_is_included_and_nothing_after(model: Any, pad_left: Pad) -> None:
    free = free_greedy(model, pad_left)
    stop = int(free[0, 4])
    place = free[0].tolist().index(stop)
    ids, mask = pad_left(PROMPTS)
    rollout = greedy_rollout(model, Tokens(ids, mask), 10, [stop], PAD)
    row = rollout.completion_ids[0].tolist()
    assert row[: place + 1] == free[0, : place + 1].tolist()
    assert row[place + 1 :] == [PAD] * (len(row) - place - 1)
    assert rollout.completion_mask[0].tolist() == [i <= place for i in range(len(row))]
    assert (rollout.sampled_log_probs[0, place + 1 :] == 0).all()
    assert not rollout.truncated[0]


def test_the_rollout_is_as_long_as_its_longest_completion(model: Any, pad_left: Pad) -> None:
    ids, mask = pad_left(PROMPTS)
    free = greedy_rollout(model, Tokens(ids, mask), 10, [271], PAD).completion_ids
    stops = sorted(set(free[:, 2].tolist()))
    rollout = greedy_rollout(model, Tokens(ids, mask), 10, stops, PAD)
    assert rollout.completion_ids.shape == rollout.completion_mask.shape
    assert rollout.completion_ids.shape[1] == int(rollout.completion_mask.sum(1).max()) <= 3
    assert not rollout.truncated.any()


def test_truncated_says_that_no_stop_token_came_in_time(model: Any, pad_left: Pad) -> None:
    found = sample(model, pad_left, EVERY, SAMPLING)
    assert {flag for _, flag in found} == {True, False}
    for tokens, truncated in found:
        assert truncated == (tokens[-1] not in STOPS)
        assert not truncated or len(tokens) == 16
        assert not set(tokens[:-1]) & set(STOPS)


def test_a_stop_token_at_the_last_place_is_not_truncated(model: Any, pad_left: Pad) -> None:
    free = free_greedy(model, pad_left)
    ids, mask = pad_left(PROMPTS)
    rollout = greedy_rollout(model, Tokens(ids, mask), 1, [int(free[0, 0])], PAD)
    assert rollout.completion_ids[0].tolist() == [int(free[0, 0])]
    assert not rollout.truncated[0]
    assert rollout.truncated.tolist() == (free[:, 0] != free[0, 0]).tolist()


def test_one_new_token_asks_the_model_once(model: Any, pad_left: Pad) -> None:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = sample(model, pad_left, EVERY, Sampling(max_new_tokens=1))
    assert len(calls) == 1
    assert [tokens for tokens, _ in found] == [
        tokens[:1] for tokens, _ in sample(model, pad_left, EVERY, SAMPLING)
    ]


def test_a_row_is_the_same_alone_in_a_batch_and_in_another_order(model: Any, pad_left: Pad) -> None:
    together = sample(model, pad_left, EVERY, SAMPLING)
    lengths = {len(tokens) for tokens, _ in together}
    assert len(lengths) > 2  # rows end at different steps
    assert [sample(model, pad_left, [row], SAMPLING)[0] for row in EVERY] == together
    assert sample(model, pad_left, EVERY[::-1], SAMPLING) == together[::-1]


def test_more_padding_changes_nothing(model: Any, pad_left: Pad) -> None:
    ids, mask = pad_left(PROMPTS)
    wider = torch.cat([torch.full((6, 5), 9), ids], dim=1)
    wider_mask = torch.cat([torch.zeros(6, 5).bool(), mask], dim=1)
    numbers = row_uniforms(1, 0, ROWS, 1, 16)
    rollout = generate_rollout(model, Tokens(wider, wider_mask), SAMPLING, numbers, STOPS, PAD)
    assert completions(rollout) == sample(model, pad_left, EVERY, SAMPLING)


@pytest.mark.parametrize("fused", [True, False])
def test_dropping_finished_rows_changes_nothing(
    model: Any, pad_left: Pad, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    sizes: list[int] = []
    step = DecodingSteps.step

    def counted(self: DecodingSteps, tokens: Tensor) -> Tensor:
        sizes.append(len(tokens))
        return step(self, tokens)

    if fused:
        monkeypatch.setattr(DecodingSteps, "step", counted)
    else:  # a model with a hook is not fused
        hook = model.base_model.register_forward_hook
        hook(lambda _module, _args, output: sizes.append(len(output.last_hidden_state)))
    found, batches = [], []
    for fraction in (0.0, 0.25, 0.5, 2.0):  # at once, …, never
        monkeypatch.setattr(generate, "_COMPACT_AT", fraction)
        found.append(sample(model, pad_left, EVERY, SAMPLING))
        batches.append(sizes.copy())
        sizes.clear()
    assert found[1:] == [found[0]] * 3
    assert set(batches[3]) == {6}
    assert batches[0][-1] < batches[0][0]
    assert sum(batches[0]) < sum(batches[2]) < sum(batches[3])


def test_several_completions_are_those_of_each_sample_number(model: Any, pad_left: Pad) -> None:
    three = Sampling(max_new_tokens=16, completions_per_prompt=3)
    together = sample(model, pad_left, EVERY, three)
    assert len(together) == 18
    # Sample 0 of each prompt is what one completion a prompt would be.
    assert together[::3] == sample(model, pad_left, EVERY, SAMPLING)
    assert together[6:9] == sample(model, pad_left, [2], three)
    assert len({tuple(tokens) for tokens, _ in together[:3]}) == 3


def test_prefix_sharing_changes_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch, pad_left: Pad
) -> None:
    prefix = list(range(150, 162))
    ids, mask = pad_left([prefix + prompt for prompt in PROMPTS])
    numbers = row_uniforms(1, 0, ROWS, 2, 16)
    sampling = Sampling(max_new_tokens=16, completions_per_prompt=2)
    rows: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = []
    for shortest in (1, 12, 13):
        monkeypatch.setattr(layout, "SHORTEST", {"cpu": shortest, "cuda": 0})
        rollout = generate_rollout(model, Tokens(ids, mask), sampling, numbers, STOPS, PAD)
        found.append(completions(rollout))
        assert (rows[0] == 1) == (shortest <= 12)  # the prefix is read once, for one row
        rows.clear()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probs_are_those_of_a_full_forward_pass(
    model: Any, pad_left: Pad, temperature: float
) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=temperature, top_k=50)
    ids, mask = pad_left(PROMPTS)
    numbers = row_uniforms(1, 0, ROWS, 1, 12)
    rollout = generate_rollout(model, Tokens(ids, mask), sampling, numbers, STOPS, PAD)
    for row, (tokens, _) in enumerate(completions(rollout)):
        whole = torch.tensor([PROMPTS[row] + tokens])
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, len(PROMPTS[row]) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)
        mine = rollout.sampled_log_probs[row]
        torch.testing.assert_close(mine[: len(tokens)], expected, rtol=0, atol=1e-4)
        assert (mine[len(tokens) :] == 0).all()


def test_other_numbers_give_other_completions(model: Any, pad_left: Pad) -> None:
    ids, mask = pad_left(PROMPTS)
    found = [
        completions(
            generate_rollout(
                model, Tokens(ids, mask), SAMPLING, row_uniforms(1, step, ROWS, 1, 16), STOPS, PAD
            )
        )
        for step in (0, 1)
    ]
    assert all(first != second for first, second in zip(*found, strict=True))


def test_a_model_that_has_diverged_is_refused_with_a_reason(model: Any, pad_left: Pad) -> None:
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    reason = r"logits are not finite .* in 6 of 6 completions"
    with pytest.raises(UserError, match=reason):
        free_greedy(model, pad_left)
    with pytest.raises(UserError, match=reason):
        sample(model, pad_left, EVERY, SAMPLING)
