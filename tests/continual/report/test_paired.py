"""What the report adds to paired tests: intervals and corrections, against values by hand."""

import numpy as np
import pytest

from sdft_lightning.continual.report.comparisons import bootstrap_interval, holm


def scores(only_first: int, only_second: int, both: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n,) of two models with these discordant items."""
    first = np.array([1.0] * only_first + [0.0] * only_second + [1.0] * both)
    second = np.array([0.0] * only_first + [1.0] * only_second + [1.0] * both)
    return first, second


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


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.6: times 4, 3, 2, 1; the third must not fall below the second
    assert holm([0.03, 0.01, 0.6, 0.02]) == pytest.approx([0.06, 0.04, 0.6, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
