"""The tables of what was learned and what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from sdft_lightning.continual.report.summary import Cell, Column, Summary
from sdft_lightning.continual.report.tables import (
    NOTHING,
    Table,
    estimate,
    fewer,
    mean,
    percent,
    points,
    seed_count,
)

_SCORES = {
    "average_accuracy": "Average accuracy, %",
    "forgetting": "Forgetting, points",
    "backward_transfer": "Backward transfer, points",
    "forward_transfer": "Forward transfer, points",
}


def summary_table(summaries: Sequence[Summary]) -> Table:
    """New tasks and retained abilities, a row a method."""
    drifts = _drift_names(summaries)
    header = (
        "Method",
        "Seeds",
        "New tasks, %",
        "SD, new tasks",
        "Retained, %",
        "SD, retained",
        "Against base, points",
        *(f"KL, {name}" for name in drifts),
    )
    rows = []
    for each in summaries:
        done = 1 if each.is_base() else len(each.complete)
        drift = [_drift(each, name, done) for name in drifts]
        rows.append(
            (
                each.label,
                _seeds(each),
                mean(each.new, done),
                percent(each.new.spread if each.new else None),
                mean(each.retained, done),
                percent(each.retained.spread if each.retained else None),
                points(each.retained_change),
                *drift,
            )
        )
    note = (
        "After the last stage. New tasks: mean accuracy over the tasks of all stages. Retained: "
        "mean over the held-out abilities. In brackets: 95 % interval over items. SD: standard "
        "deviation over seeds. Against base: retained now less what the base has. Means are over "
        "the complete seeds, and are marked where some of these lack the figure."
    )
    if drifts:
        note += " KL: from the base, nats a token."
    return Table("summary", "What was learned, and what was kept", header, tuple(rows), note)


def _drift_names(summaries: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(n for each in summaries for p in each.points for n in p.drift))


def _seeds(summary: Summary) -> str:
    """How many seeds of how many are complete; nothing for the base."""
    return NOTHING if summary.is_base() else seed_count(len(summary.complete), summary.expected)


def _drift(summary: Summary, name: str, done: int) -> str:
    values = [point.drift[name] for point in summary.points if name in point.drift]
    if not values:
        return NOTHING
    return f"{fmean(values):.3f}" + fewer(len(values), done)


def scores_table(summaries: Sequence[Summary]) -> Table | None:
    """The field's figures; None where no plan has two stages."""
    several = [each for each in summaries if len(each.stages) > 1 and not each.is_base()]
    if not several:
        return None
    rows = []
    for each in several:
        cells = []
        for name in _SCORES:
            found = each.mean_score(name)
            if found is None:
                cells.append(NOTHING)
                continue
            value, deviation = found
            shown = percent(value) if name == "average_accuracy" else points(value)
            around = "" if deviation is None else f" ± {percent(deviation)}"
            cells.append(shown + around)
        rows.append((each.label, _seeds(each), *cells))
    note = (
        "Mean over seeds ± standard deviation over seeds. Forgetting: best earlier accuracy less "
        "the last, below 0 for a gain. Forward transfer is measured from the base model."
    )
    return Table(
        "continual",
        "Continual-learning figures",
        ("Method", "Seeds", *_SCORES.values()),
        tuple(rows),
        note,
    )


def matrix_table(number: int, summary: Summary) -> Table:
    """The forgetting matrix of a method: stages by tasks and abilities."""
    stages = range(len(summary.stages) + 1)
    cells = [[summary.matrix.get((s, i)) for i in range(len(summary.columns))] for s in stages]
    rows = tuple(
        (stage_label(summary, stage), *(map(_cell, row, summary.columns)))
        for stage, row in zip(stages, cells, strict=True)
    )
    heat = tuple(
        (None, *(c.value if c and k.fraction else None for c, k in zip(row, summary.columns)))  # noqa: B905
        for row in cells
    )
    note = "Per cent, mean over seeds, after each stage. Row “base”: before training."
    if any(column.kind != "task" for column in summary.columns):
        note += " Columns after the stages' tasks were never trained on."
    return Table(
        f"matrix-{number}",
        f"Forgetting matrix: {summary.label}",
        ("After", *(column_label(column) for column in summary.columns)),
        rows,
        note,
        heat=heat,
    )


def stage_label(summary: Summary, stage: int) -> str:
    """A row's name: the number and name of the stage."""
    return f"{stage} {summary.stages[stage - 1]}" if stage else "base"


def column_label(column: Column) -> str:
    """A column's name, with the metric where it is not accuracy."""
    return column.name if column.metric == "accuracy" else f"{column.name} ({column.metric})"


def _cell(cell: Cell | None, column: Column) -> str:
    if cell is None:
        return NOTHING
    shown = percent(cell.value) if column.fraction else f"{cell.value:.3f}"
    return shown + fewer(cell.seeds, cell.expected)


def points_table(summaries: Sequence[Summary]) -> Table:
    """Each run's end: the points of the plot."""
    rows = tuple(
        (
            each.label,
            NOTHING if point.seed is None else str(point.seed),
            estimate(point.new),
            estimate(point.retained),
        )
        for each in summaries
        for point in each.points
    )
    return Table(
        "points",
        "Each seed",
        ("Method", "Seed", "New tasks, %", "Retained, %"),
        rows,
        "After the last stage, with 95 % intervals over items.",
        text_columns=2,
    )
