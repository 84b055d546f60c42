"""pass@k without bias (Chen et al. 2021, arXiv 2107.03374, equation 1)."""

from sdft_lightning.errors import UserError


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
