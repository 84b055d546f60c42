"""The plan as a table: every run, what is done, and how long the rest may take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdft_lightning.callbacks.progress import format_seconds
from sdft_lightning.continual.plan import BASE, Budget, ContinualPlan
from sdft_lightning.continual.records import Key
from sdft_lightning.continual.units import Shard, Unit, chains_of, plan_folder, share_of

Records = Mapping[Key, Mapping[str, Any]]


def overview(plan: ContinualPlan, shard: Shard, records: Records) -> str:
    """All runs of a share with their state, and the time that is left where it is known.

    Args:
        plan: The plan.
        shard: The share.
        records: The newest record of each run.
    """
    base: list[list[Unit | None]] = [[None]] if shard.number == 1 else []
    chains = base + [[*chain] for chain in share_of(chains_of(plan), shard)]
    rows = [("run", "trains", "state", "seconds")]
    left: list[float | None] = []
    for unit in (unit for chain in chains for unit in chain):
        record = records.get((BASE, None, 0) if unit is None else unit.key)
        if record is not None and record["status"] == "finished":
            state, seconds = "done", f"{_seconds(record):.0f}"
        else:
            state = "to do" if record is None else "failed, to do again"
            left.append(estimate(plan, unit, records))
            seconds = "" if left[-1] is None else f"about {left[-1]:.0f}"
        length = "nothing" if unit is None else _length(plan.budget_of(unit.stage))
        rows.append((BASE if unit is None else unit.run, length, state, seconds))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([f"{plan_folder(plan)}:", *lines, _time_left(left)])


def _length(budget: Budget) -> str:
    if budget.updates is not None:
        return f"{budget.updates} updates"
    return f"{budget.tokens} tokens"


def _seconds(record: Mapping[str, Any]) -> float:
    return float(sum(record["seconds"].values()))


def estimate(plan: ContinualPlan, unit: Unit | None, records: Records) -> float | None:
    """Seconds of a run, from finished runs of the same method; None where there is none.

    Training is taken to grow with updates (or tokens), evaluation to be as long as it was.
    """
    method = BASE if unit is None else unit.method
    done = [
        record
        for (name, _, _), record in records.items()
        if name == method and record["status"] == "finished"
    ]
    if unit is None or not done:
        return None
    budget = plan.budget_of(unit.stage)
    what, amount = ("updates", budget.updates) if budget.updates else ("tokens", budget.tokens)
    trained: int = sum(record[what] for record in done)
    fit: float = sum(record["seconds"]["fit"] for record in done)
    evaluation: float = sum(record["seconds"]["evaluate"] for record in done)
    return fit / max(trained, 1) * (amount or 0) + evaluation / len(done)


def _time_left(left: list[float | None]) -> str:
    """The sum, and how many runs it cannot tell."""
    known = [seconds for seconds in left if seconds is not None]
    unknown = len(left) - len(known)
    if not left:
        return "All is done."
    text = f"{len(left)} runs to do"
    if known:
        text += f", {len(known)} of them about {format_seconds(sum(known))} (as their method took)"
    if unknown:
        text += f"; how long {'the other ' if known else ''}{unknown} take is not known: none of "
        text += "their method is finished"
    return f"{text}."
