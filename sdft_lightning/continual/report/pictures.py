"""Every plot of a report, ready for files, for the page, and for TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from sdft_lightning.continual.report.curves import Line, curve_title, learning_curves, stage_starts
from sdft_lightning.continual.report.heat_map import matrix
from sdft_lightning.continual.report.looks import Look, plain_text
from sdft_lightning.continual.report.plots import curve, pareto
from sdft_lightning.continual.report.results import Results
from sdft_lightning.continual.report.summary import Summary
from sdft_lightning.continual.report.svg import inline_svg
from sdft_lightning.continual.report.tables import percent


class Picture(NamedTuple):
    """One plot.

    Attributes:
        name: Of its files.
        title: What it shows.
        description: For those who cannot see it.
        figure: With its legend.
        svg: Without one, for a page that has it; empty where the page has a table instead.
    """

    name: str
    title: str
    description: str
    figure: Figure
    svg: str


def draw(
    results: Results, summaries: Sequence[Summary], styles: Mapping[str, Look]
) -> dict[str, list[Picture]]:
    """The plots by section of the report."""
    with plain_text():
        return {
            "summary": _pareto(summaries, styles),
            "forgetting": _matrices(summaries),
            "curves": _curves(results, styles),
        }


def _pareto(summaries: Sequence[Summary], styles: Mapping[str, Look]) -> list[Picture]:
    figure, bare = (pareto(summaries, styles, legend) for legend in (True, False))
    if figure is None or bare is None:
        return []
    title = "New tasks against retained abilities"
    ends = [
        f"{each.label}: new tasks {percent(each.new.estimate.value)} %, retained "
        f"{percent(each.retained.estimate.value)} %"
        for each in summaries
        if each.new and each.retained
    ]
    description = "; ".join(ends) + "."
    svg = inline_svg(bare, "pareto", title, description)
    return [Picture("pareto", title, description, figure, svg)]


def _matrices(summaries: Sequence[Summary]) -> list[Picture]:
    methods = [each for each in summaries if not each.is_base() and each.columns]
    return [
        Picture(
            f"matrix-{number}",
            f"Forgetting matrix: {each.label}",
            "Accuracy on each task after each stage; the table of the same name has the figures.",
            matrix(each),
            "",
        )
        for number, each in enumerate(methods, start=1)
    ]


def _curves(results: Results, styles: Mapping[str, Look]) -> list[Picture]:
    starts = stage_starts(results.methods)
    found = []
    for number, (name, lines) in enumerate(learning_curves(results.methods).items(), start=1):
        figure, bare = (curve(name, lines, starts, styles, legend) for legend in (True, False))
        key = f"curve-{number}-{slug(name)}"
        description = _ends(lines)
        title = f"Learning curve of {curve_title(name)}"
        svg = inline_svg(bare, key, title, description)
        found.append(Picture(key, title, description, figure, svg))
    return found


def _ends(lines: Sequence[Line]) -> str:
    ends = [
        f"{line.label}{'' if line.seed is None else f', seed {line.seed}'} begins at "
        f"{line.values[0]:.3f} and ends at {line.values[-1]:.3f}"
        for line in lines
    ]
    return "; ".join(ends) + "."


def slug(text: str) -> str:
    """A part of a file name: letters, digits, hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40] or "x"
