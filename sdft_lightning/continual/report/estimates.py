"""Figures with their intervals, and means of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from sdft_lightning.continual.report.records import Measure


class Estimate(NamedTuple):
    """A figure with its 95 % interval.

    Attributes:
        value: The figure.
        low: Lower end; None where it is not known.
        high: Upper end.
    """

    value: float
    low: float | None
    high: float | None


def of_measure(measure: Measure) -> Estimate:
    """What was measured on one set of items."""
    return Estimate(measure.value, measure.low, measure.high)


def over_sets(parts: Sequence[Estimate]) -> Estimate:
    """The mean over k sets of items that have no items in common.

    With m the mean of the values v_i, and l_i and u_i the ends of their intervals:

        m - sqrt(Σ (v_i - l_i)²) / k   to   m + sqrt(Σ (u_i - v_i)²) / k

    Source: G. Y. Zou, A. Donner, Construction of confidence limits about effect measures: a general
    approach, Statistics in Medicine 27 (2008) 1693-1702 (MOVER). Each set's own interval enters, so
    that a set at 0 or 1 keeps the width that Wilson's has there.

    Args:
        parts: One estimate a set; at least one. Without all intervals the mean has none.
    """
    value = fmean(part.value for part in parts)
    below, above = 0.0, 0.0
    for part in parts:
        if part.low is None or part.high is None:
            return Estimate(value, None, None)
        below += (part.value - part.low) ** 2
        above += (part.high - part.value) ** 2
    count = len(parts)
    return Estimate(value, value - math.sqrt(below) / count, value + math.sqrt(above) / count)


def over_seeds(parts: Sequence[Estimate]) -> Estimate:
    """The mean over seeds that answered the same items.

    The ends of the interval are means of the seeds' ends: as the items are the same, more seeds
    tell nothing more about other items, and the interval does not shrink with them. It says what
    these models would score on other items, not what other seeds would; `spread` tells that.

    Args:
        parts: One estimate a seed; at least one.
    """
    value = fmean(part.value for part in parts)
    lows = [part.low for part in parts if part.low is not None]
    highs = [part.high for part in parts if part.high is not None]
    if len(lows) < len(parts) or len(highs) < len(parts):
        return Estimate(value, None, None)
    return Estimate(value, fmean(lows), fmean(highs))


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds (n - 1 in the denominator); None for fewer than two."""
    return stdev(values) if len(values) > 1 else None
