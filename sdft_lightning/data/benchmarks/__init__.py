"""Held-out capabilities: tasks of lm-evaluation-harness as batches of requests.

The names are imported when they are asked for, as those of `sdft_lightning.data`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdft_lightning.data.benchmarks.options import Benchmarks, BenchmarkTask
    from sdft_lightning.data.benchmarks.suite import BenchmarkSuite

__all__ = ["BenchmarkSuite", "BenchmarkTask", "Benchmarks"]


def __getattr__(name: str) -> Any:
    if name == "BenchmarkSuite":
        from sdft_lightning.data.benchmarks.suite import BenchmarkSuite

        return BenchmarkSuite
    if name in __all__:
        from sdft_lightning.data.benchmarks import options

        return getattr(options, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
