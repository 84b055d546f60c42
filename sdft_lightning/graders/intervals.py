"""How far a share of successes can be trusted; two models on the same items; pass@k."""

from __future__ import annotations

import math
from math import sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from sdft_lightning.errors import UserError
from sdft_lightning.types import Items

if TYPE_CHECKING:  # imported where used: a wrong command is answered without them
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

RESAMPLES = 9999
# The draws of one call are held in memory together with the items.
BATCH = 256
# Whole differences may add up to so much where p is computed exactly, in a second or so.
_MOST_STEPS = 30_000
# Sums of floats that are equal on paper differ by less.
ROUNDING = 1e-9


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion.

    With p = successes / n and z the standard normal quantile at (1 + confidence) / 2:

        (p + z²/2n ± z·sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)

    Unlike p ± z·sqrt(p(1 - p)/n) it stays in [0, 1] and has width at p = 0 and p = 1.
    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209-212.

    Args:
        successes: number of successes; the sum of the scores where a score may be a fraction
            (the interval is then somewhat too wide).
        n: number of trials.
        confidence: chance that such an interval covers the true proportion, in (0, 1).

    Raises:
        ValueError: n < 1, successes outside [0, n], or confidence outside (0, 1).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}. Grade at least one completion.")
    if not 0 <= successes <= n:
        raise ValueError(
            f"successes must lie in [0, n = {n}]; got {successes}. Pass the sum, not the mean "
            "or a percentage."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1); got {confidence}. For 95 % pass 0.95.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    center = p + z * z / (2 * n)
    half_width = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (center - half_width) / scale, (center + half_width) / scale
    # Exactly, low <= p <= high, with equality at p = 0 and p = 1; rounding can miss by a hair.
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k samples, drawn without replacement, is correct.

    1 - C(n - c, k) / C(n, k), formed as a product so that no binomial overflows.

    Args:
        samples: n, completions of one problem.
        correct: c, how many of them are correct.
        k: how many are drawn; 1 to n.

    Raises:
        UserError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not 1 <= k <= samples:
        raise UserError(
            f"k: got {k}, allowed are 1 to {samples}, the number of samples. Draw more completions "
            "a problem or ask for a smaller k."
        )
    if not 0 <= correct <= samples:
        raise UserError(f"correct: got {correct}, allowed are 0 to {samples}, the samples.")
    failed = 1.0
    for i in range(k):
        failed *= max(0, samples - correct - i) / (samples - i)
    return 1.0 - failed


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
    import numpy as np
    from scipy import stats

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
    test. Otherwise, and where the magnitudes add up to more than 30,000, it is
    `scipy.stats.permutation_test` with 9999 draws.

    Args:
        first: (S, n) scores of the first method: seeds by items.
        second: (S, n) those of the second.

    Returns:
        p, and whether it is exact.
    """
    import numpy as np
    from scipy import stats

    scaled = (first - second).sum(axis=0)  # (n,) S times the mean difference of an item
    steps = np.rint(scaled)
    is_whole = np.abs(scaled - steps).max(initial=0.0) < ROUNDING
    if is_whole and np.abs(steps).sum() <= _MOST_STEPS:
        return _exact_p(steps.astype(int)), True
    if scaled.size < 2:  # both signs of the one difference are as far from 0
        return 1.0, True
    found = stats.permutation_test(
        (first.mean(axis=0), second.mean(axis=0)),
        _mean_difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue), False


def _mean_difference(first: Array, second: Array, axis: int = -1) -> Array:
    difference: Array = (first - second).mean(axis=axis)
    return difference


def _exact_p(steps: npt.NDArray[np.int_]) -> float:
    """P(|Σ ± |k_i|| >= |Σ k_i|) for independent fair signs and whole numbers k_i."""
    import numpy as np
    from scipy import stats

    chances = np.ones(1)  # of the sums -total .. total in unit steps
    magnitudes, counts = np.unique(np.abs(steps[steps != 0]), return_counts=True)
    for k, m in zip(magnitudes.tolist(), counts.tolist(), strict=True):
        of_k = np.zeros(2 * k * m + 1)
        of_k[:: 2 * k] = stats.binom.pmf(np.arange(m + 1), m, 0.5)
        chances = np.convolve(chances, of_k)
    total = len(chances) // 2
    far = np.abs(np.arange(-total, total + 1)) >= abs(int(steps.sum()))
    return float(min(1.0, chances[far].sum()))


class Paired(NamedTuple):
    """What has changed between two measurements of the same items.

    Attributes:
        items: Number of items that have a score in both.
        lost: Items whose score is lower now: where scores are 0 or 1, right before and wrong now.
        gained: Items whose score is higher now.
        p: Two-sided: of McNemar's exact test where scores are 0 or 1, else of the sign-flip test.
        right_or_wrong: Whether all scores are 0 or 1.
    """

    items: int
    lost: int
    gained: int
    p: float
    right_or_wrong: bool


def paired_test(before: Items, now: Items) -> Paired | None:
    """Compare two measurements item by item; of perplexities, the items' log-likelihoods.

    Args:
        before: The scores of one model.
        now: Those of the other, on the same items.

    Returns:
        None where no item has a score in both.
    """
    import numpy as np

    pairs = [(before.scores[key], score) for key, score in now.scores.items()]
    known = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if not known:
        return None
    first, second = np.array(known, dtype=np.float64).T  # (n,) each
    exact = mcnemar(first, second)
    p = sign_flip_p(first[None], second[None])[0] if exact is None else exact.p
    lost, gained = int((second < first).sum()), int((second > first).sum())
    return Paired(len(known), lost, gained, p, exact is not None)
