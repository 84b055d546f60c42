"""Paired tests against values worked out by hand, by brute force, and by scipy."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from sdft_lightning.graders import Paired, mcnemar, paired_test, sign_flip_p
from sdft_lightning.types import Items


def scores(only_first: int, only_second: int, both: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n,) of two models with these discordant items."""
    first = np.array([1.0] * only_first + [0.0] * only_second + [1.0] * both)
    second = np.array([0.0] * only_first + [1.0] * only_second + [1.0] * both)
    return first, second


def test_mcnemar_by_hand() -> None:
    # 1 against 5: 2 (C(6, 0) + C(6, 1)) / 2^6 = 14 / 64
    assert mcnemar(*scores(1, 5)) == (1, 5, pytest.approx(14 / 64))
    assert mcnemar(*scores(3, 3)) == (3, 3, 1.0)
    assert mcnemar(*scores(0, 0)) == (0, 0, 1.0)


def test_mcnemar_does_not_apply_to_fractions() -> None:
    assert mcnemar(np.array([0.5, 1.0]), np.array([1.0, 1.0])) is None


@pytest.mark.parametrize(("b", "c"), [(1, 5), (4, 4), (9, 2), (0, 0), (0, 7)])
def test_sign_flip_of_one_seed_is_mcnemar(b: int, c: int) -> None:
    first, second = scores(b, c)
    test = mcnemar(first, second)
    assert test is not None
    assert sign_flip_p(first[None], second[None]) == (pytest.approx(test.p), True)


def test_sign_flip_of_three_seeds_is_the_share_of_all_sign_patterns() -> None:
    draw = np.random.default_rng(1)
    first, second = (draw.integers(0, 2, (3, 9)).astype(float) for _ in range(2))
    steps = (first - second).sum(axis=0)
    seen = abs(steps.sum())
    sums = [abs(np.dot(signs, steps)) for signs in product((-1, 1), repeat=9)]
    assert len(set(np.abs(steps))) > 2  # several magnitudes are convolved
    p, exact = sign_flip_p(first, second)
    assert exact
    assert p == pytest.approx(sum(total >= seen for total in sums) / 2**9)


def test_sign_flip_agrees_with_scipy() -> None:
    draw = np.random.default_rng(2)
    first = (draw.random((3, 12)) < 0.7).astype(float)
    second = (draw.random((3, 12)) < 0.5).astype(float)
    theirs = stats.permutation_test(
        (first.mean(axis=0), second.mean(axis=0)),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip_p(first, second)[0] == pytest.approx(theirs.pvalue)


def test_copies_of_a_seed_add_no_evidence() -> None:
    """Seeds answer the same items: treating seed x item as a sample would make p far smaller."""
    first, second = scores(9, 2, both=20)
    one = sign_flip_p(first[None], second[None])[0]
    three = sign_flip_p(np.tile(first, (3, 1)), np.tile(second, (3, 1)))[0]
    assert three == pytest.approx(one) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    pooled = mcnemar(np.tile(first, 3), np.tile(second, 3))
    assert pooled is not None
    assert pooled.p < one / 20  # what is not done


def test_fractional_scores_are_drawn_and_come_near_the_exact_p() -> None:
    draw = np.random.default_rng(3)
    first, second = draw.random((2, 10)), draw.random((2, 10)) * 0.8
    p, exact = sign_flip_p(first, second)
    difference = (first - second).mean(axis=0)
    sums = [abs(np.dot(signs, difference)) for signs in product((-1, 1), repeat=10)]
    seen = abs(difference.sum()) - 1e-12
    assert p == pytest.approx(sum(total >= seen for total in sums) / 2**10, abs=0.02)
    assert not exact


def test_one_item_with_fractional_scores_decides_nothing() -> None:
    assert sign_flip_p(np.array([[0.25]]), np.array([[0.75]])) == (1.0, True)


def items(*values: float) -> Items:
    return Items({str(i): value for i, value in enumerate(values)}, "same")


def test_large_whole_numbers_are_drawn_in_seconds() -> None:
    draw = np.random.default_rng(5)
    first, second = draw.integers(0, 90, (2, 400)).astype(float)
    exactly, exact = sign_flip_p(first[None], second[None])
    assert exact
    assert 0.05 < exactly < 0.95
    p, exact = sign_flip_p(1000 * first[None], 1000 * second[None])
    assert not exact
    assert p == pytest.approx(exactly, abs=0.02)


def test_items_that_were_right_and_are_wrong_are_lost_and_the_reverse_gained() -> None:
    before, now = items(1, 1, 1, 1, 1, 1, 0, 0), items(1, 0, 0, 0, 0, 0, 1, 0)
    # 1 against 5, as by hand above.
    assert paired_test(before, now) == Paired(8, 5, 1, pytest.approx(14 / 64), True)
    assert paired_test(now, before) == Paired(8, 1, 5, pytest.approx(14 / 64), True)


def test_log_likelihoods_are_compared_by_signs_and_the_lower_ones_are_lost() -> None:
    before = items(-10.5, -20.25, -30.125, -7.3)
    now = items(-11.1, -20.75, -30.9, -7.4)
    # All four fell: of the 16 sign patterns two are as far from 0.
    assert paired_test(before, now) == Paired(4, 4, 0, pytest.approx(2 / 16), False)


def test_items_are_paired_by_their_ids_and_those_without_a_verdict_left_out() -> None:
    before = Items({"a": 1.0, "b": 0.0, "c": 1.0}, "same")
    now = Items({"c": 0.0, "a": math.nan, "b": 0.0}, "same")
    assert paired_test(before, now) == Paired(2, 1, 0, 1.0, True)
    assert paired_test(before, Items({"a": math.nan}, "same")) is None
