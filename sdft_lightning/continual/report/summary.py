"""What each method came to: points, means over seeds, matrices, continual-learning figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from sdft_lightning.continual.report.checks import Method
from sdft_lightning.continual.report.continual_scores import (
    ContinualScores,
    Matrix,
    continual_scores,
)
from sdft_lightning.continual.report.estimates import (
    Estimate,
    of_measure,
    over_seeds,
    over_sets,
    spread,
)
from sdft_lightning.continual.report.records import Measure, Record
from sdft_lightning.continual.report.results import Results


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
