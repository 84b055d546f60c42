"""Values of the Wilson interval."""

import pytest

from sdft_lightning.graders import wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (50, 100, 0.403832, 0.596168),  # 0.5 ± 1.959964·sqrt(0.0025 + 3.841459/40000) / 1.0384146
        (0, 10, 0.0, 0.277533),  # 3.841459 / 13.841459
        (10, 10, 0.722467, 1.0),  # 10 / 13.841459
        (1, 1, 0.206549, 1.0),  # 1 / 4.841459
    ],
)
def test_values_by_hand(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-6)


def test_confidence_sets_the_quantile() -> None:
    # z = 1 at 68.27 %: p = 1/2, n = 4 gives 1/2 ± sqrt(1/16 + 1/64) / (1 + 1/4) = 1/2 ± 1/sqrt(20)
    assert wilson_interval(2, 4, 0.6826894921) == pytest.approx((0.276393, 0.723607), abs=1e-6)


def test_half_width_at_97_items_is_about_nine_points() -> None:
    low, high = wilson_interval(68, 97)
    assert (high - low) / 2 == pytest.approx(0.09, abs=0.005)


def test_a_sum_of_fractional_scores_is_allowed() -> None:
    low, high = wilson_interval(2.5, 5)
    assert low + high == pytest.approx(1.0)


@pytest.mark.parametrize("n", [1, 3, 7, 97, 10_000])
def test_the_bounds_never_leave_zero_to_one(n: int) -> None:
    for successes in (0, n):
        low, high = wilson_interval(successes, n)
        assert 0.0 <= low <= successes / n <= high <= 1.0


def test_no_trials_is_an_error() -> None:
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        wilson_interval(0, 0)


@pytest.mark.parametrize("successes", [-1, 11, float("nan")])
def test_successes_outside_the_trials_are_an_error(successes: float) -> None:
    with pytest.raises(ValueError, match=r"successes must lie in \[0, n = 10\]"):
        wilson_interval(successes, 10)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_in_percent_is_an_error(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence must lie in"):
        wilson_interval(5, 10, confidence)
