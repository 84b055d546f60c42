"""Records to methods × seeds × stages, and what is missing, failed, double or mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sdft_lightning.continual.report.checks import Method, inconsistencies, missing_runs, no_base
from sdft_lightning.continual.report.reading import Problem
from sdft_lightning.continual.report.records import BASE, Record
from sdft_lightning.errors import UserError


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
