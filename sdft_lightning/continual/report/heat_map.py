"""The forgetting matrix as a picture."""

from __future__ import annotations

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from sdft_lightning.continual.report.ability_tables import column_label, stage_label
from sdft_lightning.continual.report.looks import panel
from sdft_lightning.continual.report.summary import Summary

_HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#8fbce8"])


def matrix(summary: Summary) -> Figure:
    """The forgetting matrix of a method, shaded by its shares."""
    rows, columns = len(summary.stages) + 1, len(summary.columns)
    figure, axes = panel((max(3.2, 1.6 + 0.9 * columns), 1.5 + 0.4 * rows))
    axes.grid(False)
    shares = [
        [
            cell.value if (cell := summary.matrix.get((row, i))) and column.fraction else 0.0
            for i, column in enumerate(summary.columns)
        ]
        for row in range(rows)
    ]
    axes.imshow(shares, cmap=_HEAT, vmin=0, vmax=1, aspect="auto")
    for (row, i), cell in summary.matrix.items():
        value = f"{100 * cell.value:.1f}" if summary.columns[i].fraction else f"{cell.value:.3f}"
        partial = cell.seeds < cell.expected
        text = f"{value}\n{cell.seeds}/{cell.expected} seeds" if partial else value
        axes.text(i, row, text, ha="center", va="center", fontsize=7 if partial else 8)
    axes.set_xticks(
        range(columns), [column_label(c) for c in summary.columns], rotation=30, ha="right"
    )
    axes.set_yticks(range(rows), [stage_label(summary, row) for row in range(rows)])
    axes.set_title(f"{summary.label}: % after each stage")
    return figure
