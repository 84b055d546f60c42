"""Paired tests against values worked out by hand, by brute force, and by scipy."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from sdft_lightning.continual.report.comparisons import (
    bootstrap_interval,
    holm,
    mcnemar,
    sign_flip_p,
)


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


def test_bootstrap_keeps_the_seeds_of_an_item_together() -> None:
    first, second = scores(9, 2, both=20)
    one = bootstrap_interval(first[None], second[None])
    three = bootstrap_interval(np.tile(first, (3, 1)), np.tile(second, (3, 1)))
    assert one == pytest.approx(three)
    assert one is not None
    difference = first - second
    half = 1.96 * difference.std() / np.sqrt(len(difference))
    assert (one[1] - one[0]) / 2 == pytest.approx(half, rel=0.06)
    assert sum(one) / 2 == pytest.approx(difference.mean(), abs=0.02)


def test_bootstrap_makes_no_width_of_nothing() -> None:
    same = np.ones((2, 5))
    assert bootstrap_interval(same, same) is None
    assert bootstrap_interval(np.ones((1, 1)), np.zeros((1, 1))) is None


def test_fractional_scores_are_drawn_and_come_near_the_exact_p() -> None:
    draw = np.random.default_rng(3)
    first, second = draw.random((2, 10)), draw.random((2, 10)) * 0.8
    p, exact = sign_flip_p(first, second)
    difference = (first - second).mean(axis=0)
    sums = [abs(np.dot(signs, difference)) for signs in product((-1, 1), repeat=10)]
    seen = abs(difference.sum()) - 1e-12
    assert p == pytest.approx(sum(total >= seen for total in sums) / 2**10, abs=0.02)
    assert not exact


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.6: times 4, 3, 2, 1; the third must not fall below the second
    assert holm([0.03, 0.01, 0.6, 0.02]) == pytest.approx([0.06, 0.04, 0.6, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_one_item_with_fractional_scores_decides_nothing() -> None:
    assert sign_flip_p(np.array([[0.25]]), np.array([[0.75]])) == (1.0, True)
