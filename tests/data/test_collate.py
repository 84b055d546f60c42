"""Padding, and what a batch carries."""

from __future__ import annotations

import torch

from sdft_lightning.data.batches import collate, pad
from sdft_lightning.data.tokens import TokenizedRow
from sdft_lightning.types import Demonstration

PAD = 7  # also a token of the rows: only the mask tells them apart


def tokens(number: int, prompt: list[int], teacher: list[int], target: list[int]) -> TokenizedRow:
    row = Demonstration(str(number), [], [], None, None, "")
    return TokenizedRow(row, prompt, teacher, target)


ROWS = [tokens(0, [1, 7], [1, 2, 3], [4, 7]), tokens(1, [5], [6], [7])]


def test_pad_goes_to_the_named_side_and_the_mask_tells_a_pad_id_inside_a_row_from_padding() -> None:
    ids, mask = pad([[1, 7], [5]], PAD, "left")
    assert ids.tolist() == [[1, 7], [7, 5]]
    assert mask.tolist() == [[True, True], [False, True]]
    ids, mask = pad([[4, 7], [7]], PAD, "right")
    assert ids.tolist() == [[4, 7], [7, 7]]
    assert mask.tolist() == [[True, True], [True, False]]
    assert ids.dtype == torch.long
    assert mask.dtype == torch.bool


def test_prompts_are_padded_on_the_left_and_targets_on_the_right() -> None:
    batch = collate(ROWS, PAD, "task", "exact")
    assert batch.prompt_ids.tolist() == [[1, 7], [7, 5]]
    assert batch.prompt_mask.tolist() == [[True, True], [False, True]]
    assert batch.teacher_prompt_ids.tolist() == [[1, 2, 3], [7, 7, 6]]
    assert batch.teacher_prompt_mask.tolist() == [[True] * 3, [False, False, True]]
    assert batch.demonstration_ids.tolist() == [[4, 7], [7, 7]]
    assert batch.demonstration_mask.tolist() == [[True, True], [True, False]]
    assert [row.id for row in batch.rows] == ["0", "1"]
    assert (batch.task, batch.grader, batch.window) == ("task", "exact", [])


def test_row_without_demonstration_has_nothing_but_padding_as_teacher_prompt() -> None:
    batch = collate([*ROWS, tokens(2, [5], [], [])], PAD, "task")
    assert batch.prompt_ids.shape == (3, 2)
    assert batch.teacher_prompt_ids[2].tolist() == [PAD] * 3
    assert batch.teacher_prompt_mask.any(dim=1).tolist() == [True, True, False]


def test_contexts_are_padded_on_the_right_and_have_no_columns_where_nobody_trains_on_them() -> None:
    rows = [tokens(0, [], [], [])._replace(context_ids=ids) for ids in ([1, 7], [5])]
    batch = collate(rows, PAD, "task")
    assert batch.context_ids.tolist() == [[1, 7], [5, 7]]
    assert batch.context_mask.tolist() == [[True, True], [True, False]]
    assert batch.prompt_ids.shape == (2, 0)
    assert collate(ROWS, PAD, "task").context_ids.shape == (2, 0)


def test_first_batch_of_a_window_carries_the_later_ones_in_order() -> None:
    later = [collate([ROWS[1]], PAD, "task"), collate([ROWS[0]], PAD, "task")]
    batch = collate(ROWS, PAD, "task", window=later)
    assert [[row.id for row in each.rows] for each in batch.window] == [["1"], ["0"]]
