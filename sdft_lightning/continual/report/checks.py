"""What is missing from a plan's results, or does not fit together."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from sdft_lightning.continual.report.reading import Problem
from sdft_lightning.continual.report.records import Measure, Record

# Means are written as floats: sums in another order differ by far less.
_ROUNDING = 1e-6


class Method(NamedTuple):
    """The runs of one method in one plan.

    Attributes:
        name: Its name in the plan.
        label: The same, with the plan where the results mix several.
        plan: The plan's hash.
        stages: Names of the stages.
        seeds: Seeds that any method of the plan has records of.
        runs: Finished runs by seed and stage.
        base: The model before training; None where its record is missing.
    """

    name: str
    label: str
    plan: str
    stages: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Mapping[tuple[int, int], Record]
    base: Record | None

    def complete_seeds(self) -> tuple[int, ...]:
        """Seeds of which every stage has finished."""
        count = len(self.stages)
        return tuple(
            seed
            for seed in self.seeds
            if all((seed, stage) in self.runs for stage in range(1, count + 1))
        )

    def final(self, seed: int) -> Record:
        """The record after the last stage."""
        return self.runs[seed, len(self.stages)]


def no_base(suffix: str) -> Problem:
    """Say that the model before training was not measured."""
    return Problem(
        "no base",
        f"There is no record of the base model{suffix}: forward transfer and changes from the base "
        "cannot be told.",
    )


def missing_runs(
    method: Method, failures: Container[tuple[str, str, int | None, int]]
) -> list[Problem]:
    """Runs that are expected and not there.

    Expected is each stage of the plan with each seed that any of its methods has a record of. A
    seed or a method of which no record exists at all cannot be known to be missing.

    Args:
        method: Runs of one method.
        failures: Plan, method, seed and stage of failed runs, which have a problem of their own.
    """
    found = []
    for seed in method.seeds:
        absent = [
            f"{stage} ({name})"
            for stage, name in enumerate(method.stages, start=1)
            if (seed, stage) not in method.runs
            and (method.plan, method.name, seed, stage) not in failures
        ]
        if absent:
            found.append(
                Problem(
                    "missing run",
                    f"{method.label}, seed {seed}: no result of stage {', '.join(absent)}. Means "
                    "that need it are over fewer seeds, and say so.",
                )
            )
    return found


def inconsistencies(methods: Sequence[Method], base: Record | None) -> list[Problem]:
    """Figures of one plan that do not fit together.

    Args:
        methods: The methods of the plan.
        base: Its base record, if there is one.
    """
    records = [] if base is None else [base]
    records += [record for method in methods for record in method.runs.values()]
    found: list[Problem] = []
    for kind in ("tasks", "capabilities"):
        measured = [(record, getattr(record, kind)) for record in records]
        for name in dict.fromkeys(name for _, measures in measured for name in measures):
            found += _of_one_set(kind, name, [(r, m.get(name)) for r, m in measured])
    for stage in records[0].stages if records else ():
        if not any(stage in record.tasks for record in records):
            text = f"The task of stage {stage} was not measured in any run ({records[0].source})."
            found.append(Problem("not measured", text))
    return found


def _of_one_set(
    kind: str, name: str, measured: Sequence[tuple[Record, Measure | None]]
) -> Iterator[Problem]:
    label = f"{kind}.{name}"
    absent = [record.source for record, measure in measured if measure is None]
    if absent:
        text = f"{label} is missing in {len(absent)} of {len(measured)} records"
        yield Problem("not measured", f"{text} ({_some(absent)}). Means over it leave them out.")
    there = [(record, measure) for record, measure in measured if measure is not None]
    metrics = list(dict.fromkeys(measure.metric for _, measure in there))
    if len(metrics) > 1:
        text = f"{label} was measured as {' and as '.join(metrics)}. Do not compare its figures."
        yield Problem("mixed metrics", text)
    sizes = _sets_of_items([measure.items for _, measure in there])
    if sizes > 1:
        text = f"{label} was measured on {sizes} different sets of items. Paired tests use those "
        yield Problem("other items", text + "that both sides have; means use all.")
    wrong = [
        f"{record.source}: {measure.value:.4f}, items {fmean(measure.items.values()):.4f}"
        for record, measure in there
        if measure.items and abs(measure.value - fmean(measure.items.values())) > _ROUNDING
    ]
    if wrong:
        text = f"{label}: the {metrics[0]} is not the mean of its items ({_some(wrong)}). "
        yield Problem(
            "figures disagree", text + "Tables show the former, paired tests use the latter."
        )


def _sets_of_items(items: Sequence[Mapping[str, float]]) -> int:
    return len({frozenset(each) for each in items if each})


def _some(sources: Sequence[str]) -> str:
    return "; ".join(sources[:3]) + ("; ..." if len(sources) > 3 else "")
