"""Held-out capabilities: tasks of lm-evaluation-harness as batches of requests."""

from sdft_lightning.data.benchmarks.options import Benchmarks, BenchmarkTask
from sdft_lightning.data.benchmarks.suite import BenchmarkSuite

__all__ = ["BenchmarkSuite", "BenchmarkTask", "Benchmarks"]
