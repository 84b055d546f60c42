"""How far a share of successes can be trusted; pass@k without bias."""

from math import sqrt
from statistics import NormalDist

from sdft_lightning.errors import UserError


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
