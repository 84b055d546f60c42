"""Everything that a report shows, as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sdft_lightning.continual.report.comparisons import Comparisons
from sdft_lightning.continual.report.results import Results
from sdft_lightning.continual.report.summary import Summary


def report_numbers(
    results: Results, summaries: Sequence[Summary], comparisons: Comparisons
) -> dict[str, Any]:
    """Everything that was computed, as plain values."""
    return {
        "problems": [problem._asdict() for problem in results.problems],
        "methods": [_summary_numbers(each) for each in summaries],
        "tests": [_plain(each) for each in comparisons.pooled],
        "mcnemar": [_plain(each) for each in comparisons.by_seed],
        "untested": list(comparisons.untested),
    }


def _summary_numbers(summary: Summary) -> dict[str, Any]:
    numbers: dict[str, Any] = _plain(summary)
    numbers["matrix"] = [
        {"stage": stage, "name": summary.columns[i].name, **cell._asdict()}
        for (stage, i), cell in summary.matrix.items()
    ]
    return numbers


def _plain(value: Any) -> Any:
    """Named tuples as objects, tuples as lists, nan as null."""
    if hasattr(value, "_asdict"):
        return {key: _plain(each) for key, each in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
