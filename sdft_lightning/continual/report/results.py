"""Records to methods × seeds × stages, and what is missing, failed, double or mixed."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from sdft_lightning.continual.report.records import BASE, Measure, Problem, Record
from sdft_lightning.errors import UserError

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
        if measure.items
        and measure.mean_of_items
        and abs(measure.value - fmean(measure.items.values())) > _ROUNDING
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


class Results(NamedTuple):
    """All that the files hold.

    Attributes:
        methods: In the order of their first record.
        bases: Finished base records by plan, with their labels.
        problems: What a reader must know.
        failed: Records of runs that failed and have no finished record.
    """

    methods: tuple[Method, ...]
    bases: Mapping[str, tuple[str, Record]]
    problems: tuple[Problem, ...]
    failed: tuple[Record, ...]


def gather(records: Sequence[Record], problems: Sequence[Problem] = ()) -> Results:
    """Sort records into methods and say what is missing or odd.

    Nothing is pooled over plans: where the files hold several, each method carries its plan in its
    label and is compared with the base and the methods of its own plan only.

    Args:
        records: As they were read.
        problems: Those of the files.

    Raises:
        UserError: If records of one plan name different stages.
    """
    plans = list(dict.fromkeys(record.plan for record in records))
    found = list(problems)
    if len(plans) > 1:
        listed = ", ".join(plan[:8] for plan in plans)
        found.append(
            Problem(
                "mixed plans",
                f"The files mix results of {len(plans)} plans ({listed}): settings or data may "
                "differ between them. Nothing is averaged or tested over plans, and the base of "
                "each is its own.",
            )
        )
    methods: list[Method] = []
    bases: dict[str, tuple[str, Record]] = {}
    failed: list[Record] = []
    for plan in plans:
        of_plan = [record for record in records if record.plan == plan]
        suffix = f" (plan {plan[:8]})" if len(plans) > 1 else ""
        _check_stages(of_plan)
        finished, plan_failed = _one_each(of_plan, suffix, found)
        failed += plan_failed
        base = finished.get((BASE, None, 0))
        if base is not None:
            bases[plan] = f"{BASE}{suffix}", base
        else:
            found.append(no_base(suffix))
        methods += _methods(of_plan, finished, base, suffix)
    failures = {(record.plan, *_key(record)) for record in failed}
    found += [problem for method in methods for problem in missing_runs(method, failures)]
    for plan in plans:
        before = bases[plan][1] if plan in bases else None
        found += inconsistencies([each for each in methods if each.plan == plan], before)
    return Results(tuple(methods), bases, tuple(found), tuple(failed))


_Key = tuple[str, int | None, int]


def _key(record: Record) -> _Key:
    return record.method, record.seed, record.stage


def describe(record: Record, suffix: str = "") -> str:
    """A run in words: method, seed and stage."""
    if record.stage == 0:
        return f"{BASE}{suffix}"
    stage = f"stage {record.stage} ({record.stages[record.stage - 1]})"
    return f"{record.method}{suffix}, seed {record.seed}, {stage}"


def _check_stages(records: Sequence[Record]) -> None:
    first = records[0]
    for record in records:
        if record.stages != first.stages:
            raise UserError(
                f"{record.source}: stages are {', '.join(record.stages)}, and in {first.source} of "
                f"the same plan {', '.join(first.stages)}. One of the lines was changed by hand: "
                "take it out."
            )


def _one_each(
    records: Sequence[Record], suffix: str, problems: list[Problem]
) -> tuple[dict[_Key, Record], list[Record]]:
    """The one finished record of each run, and the failed ones that have none."""
    grouped: dict[_Key, list[Record]] = {}
    for record in records:
        grouped.setdefault(_key(record), []).append(record)
    finished: dict[_Key, Record] = {}
    failed: list[Record] = []
    twice: list[str] = []
    for key, group in grouped.items():
        good = [record for record in group if record.finished]
        bad = [record for record in group if not record.finished]
        name = describe(group[0], suffix)
        if not good:
            failed.append(bad[-1])
            why = bad[-1].error or "no error was recorded"
            problems.append(Problem("failed run", f"{name} failed: {why}. It has no figures."))
            continue
        if bad:
            problems.append(Problem("retried run", f"{name} failed before it finished.", True))
        if any(not record.same_content(good[0]) for record in good):
            lines = "; ".join(record.source for record in good)
            problems.append(
                Problem(
                    "contradiction",
                    f"{name} has {len(good)} records that say different things ({lines}). None of "
                    "them was counted: take the wrong ones out.",
                )
            )
            continue
        if len(good) > 1:
            twice.append(name)
        finished[key] = good[0]
    if twice:
        text = f"{len(twice)} records stand more than once, alike; each was counted once: "
        problems.append(Problem("duplicates", text + "; ".join(twice) + ".", True))
    return finished, failed


def _methods(
    records: Sequence[Record], finished: Mapping[_Key, Record], base: Record | None, suffix: str
) -> list[Method]:
    names = dict.fromkeys(record.method for record in records if record.stage)
    seeds = tuple(sorted({record.seed for record in records if record.seed is not None}))
    return [
        Method(
            name=name,
            label=f"{name}{suffix}",
            plan=records[0].plan,
            stages=records[0].stages,
            seeds=seeds,
            runs={
                (seed, stage): record
                for (method, seed, stage), record in finished.items()
                if method == name and seed is not None
            },
            base=base,
        )
        for name in names
    ]
