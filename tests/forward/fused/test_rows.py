"""How tokens are laid out, and who attends together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdft_lightning.forward.fused import rows as rows_file
from sdft_lightning.forward.fused.rows import groups_of, prompt_rows, with_completions
from sdft_lightning.forward.layout import SplitPrompts, split_prompts
from sdft_lightning.types import Tokens

Make = Callable[..., Any]


def test_rows_of_unequal_lengths_share_a_group() -> None:
    found = groups_of([4, 5, 5, 9], [range(0)] * 4, 3, 3, 2)
    assert [(group.rows, group.length) for group in found] == [(3, 5), (1, 9)]
    assert [(group.start, group.end) for group in found] == [(3, 17), (17, 26)]
    places = found[0].places
    assert places is not None
    assert places.tolist() == [*range(4), *range(5, 15)]
    assert found[1].places is None
    assert found[0].context.shape == (3, 0)


def test_rows_share_a_group_while_little_of_their_contexts_is_padding() -> None:
    contexts = [range(0, 8), range(8, 17), range(17, 57)]
    found = groups_of([0, 5, 5, 5], [range(0), *contexts], 57, 0, 2)
    assert [(group.start, group.end, group.rows) for group in found] == [(57, 67, 2), (67, 72, 1)]
    assert found[0].before == 9
    assert found[0].context.tolist() == [[*range(8), 0], [*range(8, 17)]]
    padding = found[0].padding
    assert padding is not None
    assert padding[0].tolist() == [0.0] * 8 + [float("-inf")]
    assert (padding[1] == 0).all()
    assert found[1].padding is None


def test_scores_of_a_group_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_file, "_MOST_SCORES", 3 * 4 * 10 * 16)
    found = groups_of([10] * 8, [range(6)] * 8, 6, 0, heads=4)
    assert [group.rows for group in found] == [3, 3, 2]


def test_prompts_stand_one_behind_the_other_each_once(batch: Make) -> None:
    ids, mask, _, _ = batch()
    rows = prompt_rows(split_prompts(Tokens(ids, mask)), heads=4)
    assert rows.shared == 12
    assert [len(each) for each in rows.tokens] == [3, 5, 7, 8, 8]
    for row, prompt in enumerate(rows.owner):
        tokens = [*range(12), *rows.tokens[prompt]]
        assert torch.equal(rows.ids[tokens], ids[row][mask[row]])
        assert rows.positions[tokens].tolist() == list(range(len(tokens)))
        assert rows.last[row] == tokens[-1]
    order, kept = rows.padded(22)
    assert torch.equal(kept[:, 2:], mask)
    assert not kept[:, :2].any()
    assert torch.equal(rows.ids[order][kept], ids[mask])
    again = prompt_rows(split_prompts(Tokens(ids.repeat(3, 1), mask.repeat(3, 1))), heads=4)
    assert torch.equal(again.ids, rows.ids)
    assert again.owner == rows.owner * 3


def test_completions_stand_behind_all_prompts(batch: Make) -> None:
    ids, mask, completion_ids, _ = batch()
    prompts = prompt_rows(SplitPrompts(ids[0, :0], Tokens(ids, mask)), heads=4)
    doubled = completion_ids.repeat_interleave(2, dim=0)
    lengths = torch.tensor([9, 9, 1, 4, 4, 1, 7, 7, 9, 2])
    kept = torch.arange(9) < lengths.unsqueeze(1)
    rows = with_completions(prompts, Tokens(doubled, kept), heads=4)
    assert rows.prompts == int(mask.sum()) == prompts.ids.numel()
    assert rows.ids.numel() == rows.prompts + int((lengths - 1).sum())
    for row in range(10):
        prompt = ids[row // 2][mask[row // 2]]
        predicting = rows.predicting[row, : lengths[row]]
        expected = torch.cat([prompt[-1:], doubled[row, : lengths[row] - 1]])
        assert torch.equal(rows.ids[predicting], expected)
        own = rows.positions[predicting].tolist()
        assert own == list(range(len(prompt) - 1, len(prompt) - 1 + len(own)))
    starts = [group.start for group in rows.groups]
    assert starts == sorted(starts)
    assert sum(group.end - group.start for group in rows.groups) == rows.ids.numel()
