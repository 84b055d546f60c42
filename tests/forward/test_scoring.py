"""Log-likelihoods of continuations, however they are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdft_lightning.data.batches import pad
from sdft_lightning.forward.scoring import score_continuations
from sdft_lightning.types import ScoringBatch


def make_batch(lengths: list[list[int]], contexts: list[int], same: int = 0) -> ScoringBatch:
    """Random contexts (the first `same` tokens equal) and continuations of such lengths."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(5, 260, (length,), generator=generator).tolist()

    prefix = draw(same)
    rows = [prefix + draw(length) for length in contexts]
    continuations = [draw(length) for row in lengths for length in row]
    owner = [place for place, row in enumerate(lengths) for _ in row]
    ids, mask = pad(continuations, 2, "right")
    context_ids, context_mask = pad(rows, 2, "left")
    return ScoringBatch(
        context_ids, context_mask, ids, mask, torch.tensor(owner), list(range(len(owner)))
    )


def one_by_one(model: Any, batch: ScoringBatch) -> list[tuple[float, bool]]:
    """The definition: every pair alone, in a whole pass, without padding or cache."""
    found = []
    for row, place in enumerate(batch.owner.tolist()):
        context = batch.context_ids[place][batch.context_mask[place]]
        continuation = batch.continuation_ids[row][batch.continuation_mask[row]]
        ids = torch.cat([context, continuation]).unsqueeze(0)
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        predicting = log_probs[len(context) - 1 : -1]
        total = predicting.gather(1, continuation.unsqueeze(1)).sum()
        found.append((float(total), bool((predicting.argmax(1) == continuation).all())))
    return found


BATCHES = {
    "one token each": ([[1, 1], [1, 1, 1]], [5, 9], 0),
    "unlike lengths": ([[3, 1, 7], [2, 12]], [4, 1], 0),
    "one context": ([[3, 8, 2]], [6], 0),
    "a shared beginning": ([[3, 1], [5, 2], [4]], [7, 3, 1], 20),
    "equal contexts": ([[3, 1], [5, 2]], [0, 0], 20),
    "longer than a branch may be": ([[150, 3], [20]], [4, 30], 0),
}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BATCHES)
def test_scores_are_those_of_each_pair_alone(
    make_model: Callable[..., Any], name: str, attention: str, share: bool
) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    batch = make_batch(*BATCHES[name])
    found = score_continuations(model, batch, share)
    expected = one_by_one(model, batch)
    assert len(found) == len(expected)
    for score, (log_likelihood, greedy) in zip(found, expected, strict=True):
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=2e-4)
        assert score.is_greedy == greedy


def test_a_greedy_continuation_is_told(make_model: Callable[..., Any]) -> None:
    model = make_model()
    batch = make_batch([[4, 4]], [5])
    answer = model.generate(
        batch.context_ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=2
    )[0, 5:]
    batch.continuation_ids[1] = answer
    assert [score.is_greedy for score in score_continuations(model, batch)] == [False, True]


def test_a_model_in_train_mode_scores_without_dropout(make_model: Callable[..., Any]) -> None:
    model = make_model(attention_dropout=0.5)
    batch = make_batch([[3, 2]], [5])
    expected = score_continuations(model, batch)
    model.train()
    assert score_continuations(model, batch) == expected
    assert model.training


def test_a_model_whose_cache_cannot_be_shared_scores_all_the_same(
    make_model: Callable[..., Any],
) -> None:
    model = make_model()
    batch = make_batch([[3, 2], [4]], [5, 8])
    expected = score_continuations(model, batch)
    model.config.sliding_window = 4096  # as Mistral's; longer than all of these rows
    found = score_continuations(model, batch)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-4)


def test_logits_in_pieces_give_the_same(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    batch = make_batch([[9, 5], [7]], [5, 8])
    expected = score_continuations(model, batch)
    monkeypatch.setattr("sdft_lightning.forward.scoring._LOGITS_AT_A_TIME", 272 * 2)
    for ours, theirs in zip(score_continuations(model, batch), expected, strict=True):
        assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, abs=1e-5)
        assert ours.is_greedy == theirs.is_greedy
