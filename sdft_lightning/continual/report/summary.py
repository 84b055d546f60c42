"""What each method came to: figures with intervals, matrices, continual-learning figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sdft_lightning.continual.report.records import Measure, Record
from sdft_lightning.continual.report.results import Method, Results

Matrix = npt.NDArray[np.float64]


class ContinualScores(NamedTuple):
    """What a sequence of stages came to; nan where it is not defined or not measured.

    Attributes:
        average_accuracy: Mean accuracy over all tasks after the last stage.
        forgetting: How far earlier tasks fell below their best.
        backward_transfer: What later stages did to earlier tasks.
        forward_transfer: What earlier stages did to later tasks before those were trained.
    """

    average_accuracy: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float


def continual_scores(accuracy: Matrix) -> ContinualScores:
    """All four figures of one run.

    Args:
        accuracy: (T + 1, T); [i, j] is the accuracy on task j + 1 after stage i, and row 0 is the
            base model. nan where it was not measured.
    """
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] + 1:
        raise ValueError(f"accuracy must be (T + 1, T), base first; got {accuracy.shape}.")
    return ContinualScores(
        average_accuracy(accuracy),
        forgetting(accuracy),
        backward_transfer(accuracy),
        forward_transfer(accuracy),
    )


def average_accuracy(accuracy: Matrix) -> float:
    """ACC = 1/T Σ_j R[T, j].

    Source: D. Lopez-Paz, M. Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017
    (arXiv 1706.08840).

    Args:
        accuracy: As in `continual_scores`.
    """
    return float(accuracy[-1].mean())


def backward_transfer(accuracy: Matrix) -> float:
    """BWT = 1/(T - 1) Σ_{j < T} (R[T, j] - R[j, j]): below zero where earlier tasks suffered.

    Source: Lopez-Paz and Ranzato 2017.

    Args:
        accuracy: As in `continual_scores`.

    Returns:
        nan for a single task.
    """
    after = accuracy[1:]  # (T, T) without the base
    if len(after) < 2:
        return float("nan")
    return float((after[-1] - np.diagonal(after))[:-1].mean())


def forward_transfer(accuracy: Matrix) -> float:
    """FWT = 1/(T - 1) Σ_{j > 1} (R[j - 1, j] - b[j]): above zero where earlier stages helped.

    Source: Lopez-Paz and Ranzato 2017. There b is the accuracy of a model with random
    weights; fine-tuning starts from a trained model, so b is the accuracy of the base model here.

    Args:
        accuracy: As in `continual_scores`.

    Returns:
        nan for a single task.
    """
    count = accuracy.shape[1]
    if count < 2:
        return float("nan")
    later = np.arange(1, count)
    before_own_stage = accuracy[later, later]  # (T - 1,) row i is stage i: the one before task i+1
    return float((before_own_stage - accuracy[0, later]).mean())


def forgetting(accuracy: Matrix) -> float:
    """F = 1/(T - 1) Σ_{j < T} (max_{l in 1 .. T - 1} R[l, j] - R[T, j]); below zero for a gain.

    Source: A. Chaudhry, P. K. Dokania, T. Ajanthan, P. H. S. Torr, Riemannian Walk for Incremental
    Learning: Understanding Forgetting and Intransigence, ECCV 2018 (arXiv 1801.10112). As
    there, the best is that of any stage before the last, also of one before the task's own; the
    base is none of them.

    Args:
        accuracy: As in `continual_scores`.

    Returns:
        nan for a single task.
    """
    after = accuracy[1:]  # (T, T) without the base
    if len(after) < 2:
        return float("nan")
    best = after[:-1].max(axis=0)  # (T,)
    return float((best - after[-1])[:-1].mean())


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


class Column(NamedTuple):
    """A column of a forgetting matrix.

    Attributes:
        kind: task (of a stage), other (a task of no stage), or capability.
        name: Name of the task or capability.
        metric: What was measured.
        fraction: Whether it is a share in [0, 1].
        in_mean: Whether the mean of what was retained counts it.
    """

    kind: str
    name: str
    metric: str
    fraction: bool
    in_mean: bool = True


class Cell(NamedTuple):
    """A mean over seeds.

    Attributes:
        value: The mean.
        seeds: Number of seeds that it is over; 1 for the base.
        expected: Number that it should be over.
    """

    value: float
    seeds: int
    expected: int


class Point(NamedTuple):
    """Where one run ended.

    Attributes:
        seed: Its seed; None for the base.
        new: Mean over the tasks of all stages.
        retained: Mean over the capabilities.
        drift: KL from the base by name.
    """

    seed: int | None
    new: Estimate | None
    retained: Estimate | None
    drift: Mapping[str, float]


class Mean(NamedTuple):
    """A mean over seeds: the estimate, its standard deviation over seeds, and their number."""

    estimate: Estimate
    spread: float | None
    seeds: int


class Summary(NamedTuple):
    """One method, or the base.

    Attributes:
        label: Its name.
        plan: The plan's hash.
        stages: Names of the stages.
        expected: Number of seeds that it should have; 1 for the base.
        complete: Seeds with all stages.
        points: One for each of these.
        new: Mean of the points.
        retained: Mean of the points.
        retained_change: The same less the base's.
        columns: Of the matrix.
        matrix: (stage, column index) -> cell; stage 0 is the base.
        scores: Continual-learning figures by seed; empty for the base.
    """

    label: str
    plan: str
    stages: tuple[str, ...]
    expected: int
    complete: tuple[int, ...]
    points: tuple[Point, ...]
    new: Mean | None
    retained: Mean | None
    retained_change: float | None
    columns: tuple[Column, ...]
    matrix: Mapping[tuple[int, int], Cell]
    scores: Mapping[int, ContinualScores]

    def is_base(self) -> bool:
        """Whether this is the model before training."""
        return any(point.seed is None for point in self.points)

    def mean_score(self, name: str) -> tuple[float, float | None] | None:
        """Mean over the complete seeds and standard deviation of a continual-learning figure.

        None where no seed has it, or where a complete seed lacks it.
        """
        values = [float(getattr(scores, name)) for scores in self.scores.values()]
        if not values or any(math.isnan(value) for value in values):
            return None
        return fmean(values), spread(values)


def summarise(results: Results) -> list[Summary]:
    """A summary of each base and method, each base before the methods of its plan."""
    plans = dict.fromkeys([*results.bases, *(method.plan for method in results.methods)])
    found: list[Summary] = []
    for plan in plans:
        methods = [method for method in results.methods if method.plan == plan]
        label, base = results.bases.get(plan, ("", None))
        records = [record for method in methods for record in method.runs.values()]
        everything = ([] if base is None else [base]) + records
        if not everything:
            continue
        columns = _columns(everything)
        if base is not None:
            found.append(_of_base(label, base, columns))
        found += [_of_method(method, columns) for method in methods]
    return found


def _columns(records: Sequence[Record]) -> tuple[Column, ...]:
    stages = records[0].stages
    seen: dict[tuple[str, str], list[Measure]] = {}
    for record in records:
        for name, measure in record.tasks.items():
            seen.setdefault(("task" if name in stages else "other", name), []).append(measure)
        for name, measure in record.capabilities.items():
            seen.setdefault(("capability", name), []).append(measure)
    tasks = [("task", name) for name in stages if ("task", name) in seen]
    rest = sorted((key for key in seen if key[0] != "task"), key=lambda key: key[0] != "other")
    return tuple(
        # A metric that leaves [0, 1] once is no share anywhere.
        Column(
            *key,
            seen[key][0].metric,
            all(measure.fraction for measure in seen[key]),
            all(measure.in_mean for measure in seen[key]),
        )
        for key in [*tasks, *rest]
    )


def measure_of(record: Record, column: Column) -> Measure | None:
    """What a record has in a column of the matrix."""
    where = record.capabilities if column.kind == "capability" else record.tasks
    return where.get(column.name)


def _point(record: Record, columns: Sequence[Column]) -> Point:
    return Point(
        record.seed,
        _mean_of(record, [c for c in columns if c.kind == "task"], len(record.stages)),
        _mean_of(
            record, [c for c in columns if c.kind == "capability" and c.fraction and c.in_mean], 1
        ),
        record.drift,
    )


def _mean_of(record: Record, columns: Sequence[Column], at_least: int) -> Estimate | None:
    """The mean over all columns; None where one is missing: a mean of other things misleads."""
    measures = [measure_of(record, column) for column in columns]
    there = [of_measure(measure) for measure in measures if measure is not None]
    return over_sets(there) if len(there) == len(columns) >= at_least else None


def _mean(parts: Sequence[Estimate | None]) -> Mean | None:
    there = [part for part in parts if part is not None]
    if not there:
        return None
    return Mean(over_seeds(there), spread([part.value for part in there]), len(there))


def _of_base(label: str, base: Record, columns: tuple[Column, ...]) -> Summary:
    point = _point(base, columns)
    measures = {i: measure_of(base, column) for i, column in enumerate(columns)}
    matrix = {(0, i): Cell(m.value, 1, 1) for i, m in measures.items() if m is not None}
    new, retained = _mean([point.new]), _mean([point.retained])
    return Summary(
        label, base.plan, base.stages, 1, (), (point,), new, retained, None, columns, matrix, {}
    )


def _of_method(method: Method, columns: tuple[Column, ...]) -> Summary:
    complete = method.complete_seeds()
    points = tuple(_point(method.final(seed), columns) for seed in complete)
    new, retained = _mean([p.new for p in points]), _mean([p.retained for p in points])
    before = None if method.base is None else _point(method.base, columns).retained
    return Summary(
        label=method.label,
        plan=method.plan,
        stages=method.stages,
        expected=len(method.seeds),
        complete=complete,
        points=points,
        new=new,
        retained=retained,
        retained_change=retained.estimate.value - before.value if retained and before else None,
        columns=columns,
        matrix=_matrix(method, columns),
        scores={seed: continual_scores(accuracies(method, seed)) for seed in complete},
    )


def _matrix(method: Method, columns: Sequence[Column]) -> dict[tuple[int, int], Cell]:
    cells = {}
    for index, column in enumerate(columns):
        before = None if method.base is None else measure_of(method.base, column)
        if before is not None:
            cells[0, index] = Cell(before.value, 1, 1)
        for stage in range(1, len(method.stages) + 1):
            runs = [method.runs.get((seed, stage)) for seed in method.seeds]
            measures = [measure_of(run, column) for run in runs if run is not None]
            values = [measure.value for measure in measures if measure is not None]
            if values:
                cells[stage, index] = Cell(fmean(values), len(values), len(method.seeds))
    return cells


def accuracies(method: Method, seed: int) -> Matrix:
    """(T + 1, T): what `continual_scores` takes; nan where a task was not measured."""
    found = np.full((len(method.stages) + 1, len(method.stages)), np.nan)
    for stage in range(len(method.stages) + 1):
        record = method.base if stage == 0 else method.runs[seed, stage]
        for j, task in enumerate(method.stages):
            if record is not None and task in record.tasks:
                found[stage, j] = record.tasks[task].value
    return found
