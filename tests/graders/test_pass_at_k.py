"""pass@k against counting all subsets."""

from itertools import combinations

import pytest

from sdft_lightning.errors import UserError
from sdft_lightning.graders import pass_at_k


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 2), (6, 0, 6), (4, 4, 1)])
def test_equals_the_share_of_subsets_with_a_correct_sample(n: int, c: int, k: int) -> None:
    subsets = list(combinations(range(n), k))
    share = sum(min(subset) < c for subset in subsets) / len(subsets)
    assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_is_one_where_fewer_than_k_samples_fail() -> None:
    assert pass_at_k(200, 73, 128) == 1.0


def test_stays_exact_at_k_128() -> None:
    assert pass_at_k(256, 1, 128) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 0), (5, 2, 6), (5, 6, 1), (5, -1, 1)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(UserError, match="allowed are"):
        pass_at_k(n, c, k)
