"""Tests between two models that answered the same items.

Items are the clusters: a model of another seed answers the same items, so its answers are no new
sample of items. Tests over seeds therefore keep all seeds of an item together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]

RESAMPLES = 9999
# The draws of one call are held in memory together with the items.
_BATCH = 256
# Sums of floats that are equal on paper differ by less.
_ROUNDING = 1e-9


class McNemar(NamedTuple):
    """Items that only one of two models has right, and the two-sided p of McNemar's exact test."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Array, second: Array) -> McNemar | None:
    """McNemar's exact test for two models of one seed each.

    Of the b + c items that only one model has right, b is binomial(b + c, 1/2) if both are as good:

        p = min(1, 2 P(X <= min(b, c)))

    Source: Q. McNemar, Psychometrika 12 (1947) 153-157, in its exact form.

    Args:
        first: (n,) scores of the first model.
        second: (n,) those of the second on the same items.

    Returns:
        None where a score is neither 0 nor 1, to which the test does not apply.
    """
    if not np.isin([first, second], (0.0, 1.0)).all():
        return None
    only_first = int(((first == 1) & (second == 0)).sum())
    only_second = int(((first == 0) & (second == 1)).sum())
    discordant = only_first + only_second
    p = stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
    return McNemar(only_first, only_second, float(p))


def sign_flip_p(first: Array, second: Array) -> tuple[float, bool]:
    """Two-sided p of the paired permutation test on items, all seeds of an item kept together.

    If the two methods are alike, an item's scores under one (of all its seeds) could as well stand
    under the other: the sign of its difference is + or - with equal chance, independently of other
    items. p is the share of the 2^n sign patterns whose mean difference is at least as far from 0.
    Where the S seeds' scores are 0 or 1, differences are multiples of 1/S and the distribution is
    computed exactly: for the m items of magnitude k the sum of signs is 2 B - m with B
    binomial(m, 1/2), and the magnitudes' sums are convolved. With one seed this is McNemar's exact
    test. Otherwise it is `scipy.stats.permutation_test` with 9999 draws.

    Args:
        first: (S, n) scores of the first method: seeds by items.
        second: (S, n) those of the second.

    Returns:
        p, and whether it is exact.
    """
    scaled = (first - second).sum(axis=0)  # (n,) S times the mean difference of an item
    steps = np.rint(scaled)
    if np.abs(scaled - steps).max(initial=0.0) < _ROUNDING:
        return _exact_p(steps.astype(int)), True
    if scaled.size < 2:  # both signs of the one difference are as far from 0
        return 1.0, True
    found = stats.permutation_test(
        (first.mean(axis=0), second.mean(axis=0)),
        _mean_difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue), False


def _mean_difference(first: Array, second: Array, axis: int = -1) -> Array:
    difference: Array = (first - second).mean(axis=axis)
    return difference


def _exact_p(steps: npt.NDArray[np.int_]) -> float:
    """P(|Σ ± |k_i|| >= |Σ k_i|) for independent fair signs and whole numbers k_i."""
    chances = np.ones(1)  # of the sums -total .. total in unit steps
    magnitudes, counts = np.unique(np.abs(steps[steps != 0]), return_counts=True)
    for k, m in zip(magnitudes.tolist(), counts.tolist(), strict=True):
        of_k = np.zeros(2 * k * m + 1)
        of_k[:: 2 * k] = stats.binom.pmf(np.arange(m + 1), m, 0.5)
        chances = np.convolve(chances, of_k)
    total = len(chances) // 2
    far = np.abs(np.arange(-total, total + 1)) >= abs(int(steps.sum()))
    return float(min(1.0, chances[far].sum()))


def bootstrap_interval(first: Array, second: Array) -> tuple[float, float] | None:
    """95 % interval of the mean difference: percentiles of 9999 resamples of the items.

    An item is drawn with all its seeds.

    Args:
        first: (S, n) scores of the first method: seeds by items.
        second: (S, n) those of the second.

    Returns:
        None where all items differ alike, of which the bootstrap would make no width at all.
    """
    difference = (first - second).mean(axis=0)  # (n,)
    if len(difference) < 2 or np.ptp(difference) < _ROUNDING:
        return None
    found = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    interval = found.confidence_interval
    return float(interval.low), float(interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: with p sorted, max over i <= j of min(1, (m - i + 1) p_i).

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70. Reject where the corrected p
    is at most 0.05: the chance of any false rejection is then at most 5 %.

    Args:
        p_values: Of the m comparisons.

    Returns:
        The corrected ones, in the same order.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [math.nan] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected
