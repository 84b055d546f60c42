"""Which models are compared on which items, and what the paired tests say.

Items are the clusters: a model of another seed answers the same items, so its answers are no new
sample of items. Tests over seeds therefore keep all seeds of an item together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from sdft_lightning.continual.report.records import Measure, Record
from sdft_lightning.continual.report.results import Method, Results
from sdft_lightning.graders.intervals import BATCH, RESAMPLES, ROUNDING, mcnemar, sign_flip_p

Array = npt.NDArray[np.float64]


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
    if len(difference) < 2 or np.ptp(difference) < ROUNDING:
        return None
    found = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=BATCH,
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


class Side(NamedTuple):
    """One side of a comparison: final records by seed; the base stands under None.

    Attributes:
        label: Of the method, or of the base.
        records: Those of complete seeds.
        expected: Number of seeds that the method should have.
    """

    label: str
    records: dict[int | None, Record]
    expected: int


class Pooled(NamedTuple):
    """Two methods on one set of items, over all seeds that both have.

    Attributes:
        kind: tasks or capabilities.
        name: The task or capability.
        first: Label of the first method.
        second: Label of the second, or of the base.
        items: Number of items that all its records have.
        seeds: Seeds that both have finished.
        expected: Number of seeds that the methods should have.
        differences: Mean difference of each seed, first less second.
        difference: Mean over seeds and items.
        interval: Its 95 % bootstrap interval.
        p: Of the sign-flip test.
        exact: Whether p is exact.
        corrected: Holm's p over all pooled comparisons of the report.
        shares: Whether the scores lie in [0, 1]; those of texts are log-likelihoods in nats.
    """

    kind: str
    name: str
    first: str
    second: str
    items: int
    seeds: tuple[int, ...]
    expected: int
    differences: tuple[float, ...]
    difference: float
    interval: tuple[float, float] | None
    p: float
    exact: bool
    corrected: float
    shares: bool = True


class OfSeed(NamedTuple):
    """Two models of one seed on one set of items: McNemar's exact test.

    Attributes:
        kind: tasks or capabilities.
        name: The task or capability.
        first: Label of the first method.
        second: Label of the second, or of the base.
        seed: The seed.
        items: Number of items that both have.
        only_first: Items that only the first has right.
        only_second: Items that only the second has right.
        p: Two-sided.
        corrected: Holm's p over all such comparisons of the report.
    """

    kind: str
    name: str
    first: str
    second: str
    seed: int
    items: int
    only_first: int
    only_second: int
    p: float
    corrected: float


class Comparisons(NamedTuple):
    """All tests, and the comparisons that could not be made."""

    pooled: tuple[Pooled, ...]
    by_seed: tuple[OfSeed, ...]
    untested: tuple[str, ...]


def compare(results: Results) -> Comparisons:
    """Compare each method with the base and with each other method of its plan.

    Compared are the models after the last stage, on each task and capability whose items were
    recorded.
    """
    pooled: list[Pooled] = []
    by_seed: list[OfSeed] = []
    untested: dict[str, list[str]] = {}
    for first, second in _pairs(results):
        for kind, name in _sets(first, second):
            scores = _aligned(kind, name, first, second)
            if scores is None:
                pair = f"{first.label} and {second.label}"
                untested.setdefault(f"{kind}.{name}", []).append(pair)
                continue
            seeds, ours, theirs = scores
            pooled.append(_pooled(kind, name, first, second, seeds, ours, theirs))
            by_seed += _by_seed(kind, name, (first.label, second.label), seeds, ours, theirs)
    return Comparisons(
        tuple(
            one._replace(corrected=p)
            for one, p in zip(pooled, holm([each.p for each in pooled]), strict=True)
        ),
        tuple(
            one._replace(corrected=p)
            for one, p in zip(by_seed, holm([each.p for each in by_seed]), strict=True)
        ),
        tuple(
            f"{where}, for want of scored items in common: {'; '.join(pairs)}"
            for where, pairs in untested.items()
        ),
    )


def _pairs(results: Results) -> Iterator[tuple[Side, Side]]:
    for plan in dict.fromkeys(method.plan for method in results.methods):
        methods = [method for method in results.methods if method.plan == plan]
        sides = [side for method in methods if (side := _side(method)).records]
        if plan in results.bases:
            label, base = results.bases[plan]
            yield from ((side, Side(label, {None: base}, 1)) for side in sides)
        yield from combinations(sides, 2)


def _side(method: Method) -> Side:
    records: dict[int | None, Record] = {s: method.final(s) for s in method.complete_seeds()}
    return Side(method.label, records, len(method.seeds))


def _sets(first: Side, second: Side) -> list[tuple[str, str]]:
    """Tasks and capabilities that any record of both sides has."""
    found: list[tuple[str, str]] = []
    for kind in ("tasks", "capabilities"):
        ours, theirs = (
            dict.fromkeys(name for r in side.records.values() for name in getattr(r, kind))
            for side in (first, second)
        )
        found += [(kind, name) for name in ours if name in theirs]
    return found


def _aligned(
    kind: str, name: str, first: Side, second: Side
) -> tuple[tuple[int, ...], Array, Array] | None:
    """Seeds of both sides, and the scores (S, n) of each on the items that all of them have."""

    def measure(side: Side, seed: int) -> Measure | None:
        record = side.records.get(seed, side.records.get(None))
        found: Measure | None = None if record is None else getattr(record, kind).get(name)
        return found if found is not None and found.items else None

    pairs = {
        seed: (ours, theirs)
        for seed in first.records
        if seed is not None
        and (ours := measure(first, seed)) is not None
        and (theirs := measure(second, seed)) is not None
    }
    if not pairs:
        return None
    measures = [each for pair in pairs.values() for each in pair]
    shared = set(measures[0].items).intersection(*(each.items for each in measures[1:]))
    if not shared:
        return None
    items = sorted(shared)
    first_scores, second_scores = (
        np.array([[pair[side].items[item] for item in items] for pair in pairs.values()])
        for side in (0, 1)
    )  # (S, n)
    return tuple(pairs), first_scores, second_scores


def _pooled(
    kind: str,
    name: str,
    first: Side,
    second: Side,
    seeds: tuple[int, ...],
    ours: Array,
    theirs: Array,
) -> Pooled:
    differences = (ours - theirs).mean(axis=1)  # (S,)
    p, exact = sign_flip_p(ours, theirs)
    return Pooled(
        kind=kind,
        name=name,
        first=first.label,
        second=second.label,
        items=ours.shape[1],
        seeds=seeds,
        expected=first.expected,
        differences=tuple(differences.tolist()),
        difference=float(differences.mean()),
        interval=bootstrap_interval(ours, theirs),
        p=p,
        exact=exact,
        corrected=p,
        shares=all(0 <= each.min() and each.max() <= 1 for each in (ours, theirs)),
    )


def _by_seed(
    kind: str,
    name: str,
    labels: tuple[str, str],
    seeds: Sequence[int],
    ours: Array,
    theirs: Array,
) -> list[OfSeed]:
    found = []
    for seed, first, second in zip(seeds, ours, theirs, strict=True):
        test = mcnemar(first, second)
        if test is not None:
            b, c, p = test
            found.append(OfSeed(kind, name, *labels, seed, len(first), b, c, p, p))
    return found
