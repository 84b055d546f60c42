"""All tables of the report, by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdft_lightning.continual.report.ability_tables import (
    matrix_table,
    points_table,
    scores_table,
    summary_table,
)
from sdft_lightning.continual.report.comparisons import Comparisons
from sdft_lightning.continual.report.paired_tables import by_seed_table, pooled_table
from sdft_lightning.continual.report.results import Results
from sdft_lightning.continual.report.summary import Summary
from sdft_lightning.continual.report.tables import NOTHING, Table


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
