"""Which tokens count in the loss, with every mask and mean written out by hand."""

from __future__ import annotations

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.losses.masking import (
    completion_mask,
    loss_mask,
    masked_mean,
    position_ids,
    sequence_mean,
    sequence_weights,
)

STOP, THINK_START, THINK_END = 2, 3, 4


def kept(ids: list[list[int]], stop_ids: list[int]) -> list[list[int]]:
    return completion_mask(torch.tensor(ids), stop_ids).int().tolist()


def counted(
    ids: list[list[int]], skip: int, think_end_id: int | None = None, opens_thinking: bool = False
) -> list[list[int]]:
    completion = torch.tensor(ids)
    mask = completion_mask(completion, [STOP])
    return (
        loss_mask(completion, mask, skip, think_end_id, opens_thinking, THINK_START).int().tolist()
    )


def test_pad_equal_to_eos_keeps_the_stop_token_in_the_loss() -> None:
    assert kept([[7, 8, STOP, STOP, STOP]], [STOP]) == [[1, 1, 1, 0, 0]]
    assert counted([[7, 8, STOP, STOP, STOP]], skip=0) == [[1, 1, 1, 0, 0]]


def test_any_of_several_stop_ids_ends_a_completion_and_is_kept() -> None:
    ids = [[7, 3, 8, STOP], [7, STOP, 8, 3], [9, 7, 7, 7]]
    assert kept(ids, [3, STOP]) == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_everything_after_the_first_stop_is_dropped_although_stops_repeat() -> None:
    assert kept([[7, STOP, 8, STOP, 9]], [STOP]) == [[1, 1, 0, 0, 0]]
    assert kept([[STOP, STOP, STOP]], [STOP]) == [[1, 0, 0]]


def test_a_completion_without_stop_is_kept_whole() -> None:
    assert kept([[7, 8, 9]], [STOP]) == [[1, 1, 1]]


def test_completion_mask_is_boolean_and_takes_an_empty_completion() -> None:
    assert completion_mask(torch.tensor([[7]]), [STOP]).dtype == torch.bool
    assert completion_mask(torch.zeros(2, 0, dtype=torch.long), [STOP]).shape == (2, 0)


def test_the_first_tokens_are_skipped_even_where_that_leaves_nothing() -> None:
    ids = [[7, 8, 9, 6, STOP], [7, STOP, STOP, STOP, STOP]]
    assert counted(ids, skip=3) == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]


def test_the_skip_starts_after_the_end_of_thinking() -> None:
    ids = [[7, 8, THINK_END, 9, 6, 5, STOP]]
    # The thoughts themselves stay in the loss; only the head of the answer is left out.
    assert counted(ids, 2, THINK_END) == [[1, 1, 1, 0, 0, 1, 1]]
    assert counted(ids, 2, THINK_END, opens_thinking=True) == [[1, 1, 1, 0, 0, 1, 1]]


def test_only_the_first_end_of_thinking_counts() -> None:
    ids = [[7, THINK_END, 8, THINK_END, 9, STOP]]
    assert counted(ids, 1, THINK_END) == [[1, 1, 0, 1, 1, 1]]


def test_thinking_opened_but_never_closed_keeps_all() -> None:
    assert counted([[7, 8, 9, 9]], 3, THINK_END, opens_thinking=True) == [[1, 1, 1, 1]]


def test_a_completion_that_opens_thinking_itself_and_never_closes_it_keeps_all() -> None:
    assert counted([[THINK_START, 8, 9, 9]], 3, THINK_END) == [[1, 1, 1, 1]]
    assert counted([[7, THINK_START, 8, STOP]], 2, THINK_END) == [[0, 0, 1, 1]]  # in an answer


def test_without_any_thinking_the_skip_starts_at_the_completion() -> None:
    assert counted([[7, 8, 9, STOP]], 3, THINK_END) == [[0, 0, 0, 1]]


def test_an_end_of_thinking_behind_the_stop_token_is_padding() -> None:
    ids = [[7, STOP, THINK_END, 8]]
    assert counted(ids, 1, THINK_END) == [[0, 1, 0, 0]]
    assert counted(ids, 1, THINK_END, opens_thinking=True) == [[1, 1, 0, 0]]


def test_rows_of_one_batch_start_at_different_places() -> None:
    ids = [[7, THINK_END, 8, 9, STOP], [7, 8, 9, 9, STOP]]
    assert counted(ids, 1, THINK_END) == [[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]]


def test_a_negative_skip_is_refused() -> None:
    with pytest.raises(UserError, match="num_loss_tokens_to_skip"):
        counted([[7]], skip=-1)


def test_left_padding_does_not_shift_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]


def test_sequence_mean_is_the_formula_of_the_method_with_an_empty_row() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [10.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    # mean_i [ Σ_t m D / max(1, Σ_t m) ] = (7/3 + 10/1 + 0/1) / 3: the empty row counts as 0.
    assert sequence_mean(values, mask).item() == pytest.approx((7 / 3 + 10) / 3, rel=1e-6)
    weights = [[1 / 9, 1 / 9, 1 / 9], [1 / 3, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(sequence_weights(mask), torch.tensor(weights))


def test_sequence_mean_is_not_the_mean_over_all_tokens() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert sequence_mean(values, mask).item() == pytest.approx(3.0)
    assert masked_mean(values, mask).item() == pytest.approx(2.0)


def test_masked_mean_of_nothing_is_zero() -> None:
    values = torch.tensor([3.0, 5.0])
    assert masked_mean(values, torch.tensor([False, True])).item() == 5.0
    assert masked_mean(values, torch.tensor([False, False])).item() == 0.0
