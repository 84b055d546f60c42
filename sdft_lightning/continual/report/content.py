"""All tables of the report, by section: learned, kept, paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from sdft_lightning.continual.report.comparisons import Comparisons, OfSeed, Pooled
from sdft_lightning.continual.report.results import Results
from sdft_lightning.continual.report.summary import Cell, Column, Summary
from sdft_lightning.continual.report.tables import (
    NOTHING,
    Table,
    estimate,
    fewer,
    mean,
    nats,
    p_value,
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


_SIGNIFICANT = 0.05


def pooled_table(comparisons: Comparisons) -> Table:
    """The tests over seeds."""
    rows = []
    for each in comparisons.pooled:
        written = points if each.shares else nats
        low, high = each.interval or (None, None)
        band = "" if low is None or high is None else f"[{written(low)}, {written(high)}]"
        rows.append(
            (
                each.name,
                f"{each.first} less {each.second}",
                written(each.difference),
                band or NOTHING,
                str(each.items),
                seed_count(len(each.seeds), each.expected),
                _same_sign(each),
                p_value(each.p) + ("" if each.exact else " (drawn)"),
                p_value(each.corrected),
                "yes" if each.corrected <= _SIGNIFICANT else "no",
            )
        )
    note = (
        "After the last stage. Sign-flip test and bootstrap draw items, all seeds of an item "
        f"together. Holm's correction is over these {len(rows)} comparisons. “Seeds alike”: seeds "
        "whose own difference has the sign of the mean."
    )
    if not all(each.shares for each in comparisons.pooled):
        note += " “nats”: the difference of a text's log-likelihood, the higher the better."
    header = (
        "Measured on",
        "Difference",
        "Points",
        "95 % interval",
        "Items",
        "Seeds",
        "Seeds alike",
        "p",
        "p (Holm)",
        "p (Holm) ≤ 0.05",
    )
    return Table("tests", "Paired tests over all seeds", header, tuple(rows), note, text_columns=2)


def _same_sign(pooled: Pooled) -> str:
    same = sum(d * pooled.difference > 0 for d in pooled.differences)
    return f"{same} of {len(pooled.differences)}"


def by_seed_table(comparisons: Comparisons) -> Table:
    """McNemar's test for each seed."""
    rows = tuple(_by_seed_row(each) for each in comparisons.by_seed)
    note = (
        "McNemar's exact test on the items that only one of the two has right. Holm's correction "
        f"is over these {len(rows)} comparisons. Do not add up the counts of several seeds: they "
        "are of the same items."
    )
    header = (
        "Measured on",
        "Between",
        "Seed",
        "Items",
        "Only first",
        "Only second",
        "p",
        "p (Holm)",
    )
    return Table("mcnemar", "McNemar's test for each seed", header, rows, note, text_columns=2)


def _by_seed_row(each: OfSeed) -> tuple[str, ...]:
    return (
        each.name,
        f"{each.first} and {each.second}",
        str(each.seed),
        str(each.items),
        str(each.only_first),
        str(each.only_second),
        p_value(each.p),
        p_value(each.corrected),
    )


def runs_table(results: Results) -> Table:
    """Every finished run of a stage."""
    rows = []
    for method in results.methods:
        for (seed, stage), run in sorted(method.runs.items()):
            rows.append(
                (
                    method.label,
                    f"{stage} {method.stages[stage - 1]}",
                    str(seed),
                    _whole(run.updates),
                    _whole(run.tokens),
                    _whole(run.selected_step),
                    _seconds(run.seconds, "fit"),
                    _seconds(run.seconds, "evaluate"),
                )
            )
    header = (
        "Method",
        "Stage",
        "Seed",
        "Steps",
        "Tokens",
        "Step evaluated",
        "Training, s",
        "Evaluation, s",
    )
    return Table("runs", "Every run", header, tuple(rows), text_columns=2)


def _whole(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}".replace(",", " ")


def _seconds(seconds: Mapping[str, float], name: str) -> str:
    return f"{seconds[name]:.0f}" if name in seconds else NOTHING


def all_tables(
    results: Results, summaries: Sequence[Summary], comparisons: Comparisons
) -> dict[str, list[Table]]:
    """The tables by section of the report."""
    scores = scores_table(summaries)
    matrices = [each for each in summaries if not each.is_base()] or list(summaries)
    sections = {
        "summary": [summary_table(summaries), points_table(summaries)],
        "forgetting": [
            *([scores] if scores else []),
            *(matrix_table(number, each) for number, each in enumerate(matrices, start=1)),
        ],
        "tests": [pooled_table(comparisons), by_seed_table(comparisons)],
        "runs": [runs_table(results)],
    }
    return {name: [t for t in tables if t.rows] for name, tables in sections.items()}
