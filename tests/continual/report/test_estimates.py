"""Intervals of means."""

import math

import pytest

from sdft_lightning.continual.report.summary import Estimate, over_seeds, over_sets, spread
from sdft_lightning.graders import wilson_interval


def test_independent_sets_narrow_the_interval() -> None:
    parts = [Estimate(0.5, 0.4, 0.6), Estimate(0.7, 0.5, 0.8)]
    mean = over_sets(parts)
    assert mean.value == pytest.approx(0.6)
    assert mean.low == pytest.approx(0.6 - math.sqrt(0.1**2 + 0.2**2) / 2)
    assert mean.high == pytest.approx(0.6 + math.sqrt(0.1**2 + 0.1**2) / 2)


def test_two_sets_without_an_error_keep_a_width() -> None:
    low, high = wilson_interval(10, 10)
    mean = over_sets([Estimate(1.0, low, high)] * 2)
    assert mean.high == 1.0
    assert mean.low == pytest.approx(1 - (1 - low) / math.sqrt(2))


def test_seeds_of_the_same_items_do_not_narrow_the_interval() -> None:
    assert over_seeds([Estimate(0.5, 0.4, 0.6)] * 9) == pytest.approx((0.5, 0.4, 0.6))
    mixed = over_seeds([Estimate(0.5, 0.4, 0.6), Estimate(0.7, 0.6, 0.9)])
    assert mixed == pytest.approx((0.6, 0.5, 0.75))


@pytest.mark.parametrize("mean", [over_seeds, over_sets])
def test_a_part_without_an_interval_leaves_the_mean_without_one(mean) -> None:  # noqa: ANN001
    assert mean([Estimate(0.5, 0.4, 0.6), Estimate(0.7, None, None)]) == (0.6, None, None)


def test_spread_divides_by_n_minus_one() -> None:
    assert spread([0.4, 0.6]) == pytest.approx(math.sqrt(0.02))
    assert spread([0.4]) is None
