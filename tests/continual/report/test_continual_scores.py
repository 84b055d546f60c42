"""The continual-learning figures of a matrix worked out by hand."""

import math

import numpy as np
import pytest

from sdft_lightning.continual.report.summary import (
    average_accuracy,
    backward_transfer,
    continual_scores,
    forgetting,
    forward_transfer,
)

# Base, then stages 1 to 3; columns are tasks 1 to 3.
MATRIX = np.array(
    [
        [0.10, 0.20, 0.30],
        [0.80, 0.25, 0.20],
        [0.60, 0.70, 0.40],
        [0.50, 0.75, 0.90],
    ]
)


def test_average_accuracy_is_the_mean_of_the_last_row() -> None:
    assert average_accuracy(MATRIX) == pytest.approx((0.50 + 0.75 + 0.90) / 3)


def test_backward_transfer_compares_the_last_row_with_the_diagonal() -> None:
    # task 1: 0.50 - 0.80 = -0.30; task 2: 0.75 - 0.70 = 0.05; the last task does not count
    assert backward_transfer(MATRIX) == pytest.approx((-0.30 + 0.05) / 2)


def test_forward_transfer_looks_one_stage_before_the_own_and_takes_the_base_off() -> None:
    # task 2 after stage 1: 0.25 - 0.20; task 3 after stage 2 (not 1): 0.40 - 0.30
    assert forward_transfer(MATRIX) == pytest.approx((0.05 + 0.10) / 2)


def test_forgetting_takes_the_best_stage_before_the_last() -> None:
    # task 1: 0.80 - 0.50; task 2: 0.70 - 0.75, a gain
    assert forgetting(MATRIX) == pytest.approx((0.30 - 0.05) / 2)


def test_forgetting_differs_from_minus_bwt_where_the_best_is_not_the_own_stage() -> None:
    matrix = MATRIX.copy()
    matrix[2, 0] = 0.95  # stage 2 helped task 1 before stage 3 harmed it
    assert backward_transfer(matrix) == pytest.approx(-0.125)
    assert forgetting(matrix) == pytest.approx((0.45 - 0.05) / 2)


def test_forgetting_knows_neither_the_base_nor_the_last_stage_as_best() -> None:
    matrix = MATRIX.copy()
    matrix[0, 0] = 1.0
    assert forgetting(matrix) == pytest.approx(0.125)


def test_two_tasks() -> None:
    scores = continual_scores(np.array([[0.0, 0.1], [0.9, 0.3], [0.7, 0.8]]))
    assert scores == pytest.approx((0.75, 0.2, -0.2, 0.2))


def test_one_task_has_an_average_and_nothing_else() -> None:
    scores = continual_scores(np.array([[0.1], [0.6]]))
    assert scores.average_accuracy == 0.6
    assert all(math.isnan(value) for value in scores[1:])


def test_what_was_not_measured_makes_a_figure_unknown_and_not_smaller() -> None:
    matrix = MATRIX.copy()
    matrix[0] = np.nan  # no base record
    scores = continual_scores(matrix)
    assert math.isnan(scores.forward_transfer)
    assert scores.backward_transfer == pytest.approx(-0.125)
    matrix[3, 1] = np.nan
    assert all(math.isnan(value) for value in continual_scores(matrix))


def test_matrix_without_the_row_of_the_base_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(T \+ 1, T\)"):
        continual_scores(MATRIX[1:])
