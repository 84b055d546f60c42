"""The report's plots as matplotlib figures (no pyplot: nothing global, no display).

Each is small and holds one panel: pages lay them out, on a phone one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from sdft_lightning.continual.report.content import column_label, stage_label
from sdft_lightning.continual.report.looks import (
    MUTED,
    Look,
    add_legend,
    inline_svg,
    panel,
    plain_text,
)
from sdft_lightning.continual.report.results import Method, Results
from sdft_lightning.continual.report.summary import Estimate, Summary
from sdft_lightning.continual.report.tables import percent


class Line(NamedTuple):
    """One curve.

    Attributes:
        label: Of its method.
        seed: Its seed; None for the mean over all seeds of the method.
        steps: Optimizer steps since the base model, over all stages.
        values: What was measured there.
    """

    label: str
    seed: int | None
    steps: tuple[float, ...]
    values: tuple[float, ...]


def learning_curves(methods: Sequence[Method]) -> dict[str, list[Line]]:
    """Curves by the name of what was measured.

    A mean is formed at the steps that all seeds of the method have, and nowhere else: a line over
    fewer seeds would jump where one ends.
    """
    found: dict[str, list[Line]] = {}
    for method in methods:
        by_seed = {seed: _values(method, seed) for seed in method.seeds}
        for name in dict.fromkeys(name for values in by_seed.values() for name in values):
            lines = found.setdefault(name, [])
            for seed, values in by_seed.items():
                if name in values:
                    lines.append(_line(method.label, seed, values[name]))
            mean = _mean([values.get(name, {}) for values in by_seed.values()])
            if mean:
                lines.append(_line(method.label, None, mean))
    return found


# (stage, step since the base model): where a stage ends and the next begins, both have a value.
_Values = dict[tuple[int, float], float]


def _values(method: Method, seed: int) -> dict[str, _Values]:
    """What was measured, by name, up to the first stage that is missing."""
    found: dict[str, _Values] = {}
    before = 0.0
    for stage in range(1, len(method.stages) + 1):
        record = method.runs.get((seed, stage))
        if record is None:
            break
        for point in record.curve:
            for name, value in point.items():
                if name != "step":
                    found.setdefault(name, {})[stage, before + point["step"]] = value
        last = max((point["step"] for point in record.curve), default=0.0)
        before += last if record.updates is None else record.updates
    return found


def _line(label: str, seed: int | None, values: _Values) -> Line:
    return Line(label, seed, tuple(step for _, step in values), tuple(values.values()))


def _mean(seeds: Sequence[_Values]) -> _Values:
    shared = [place for place in seeds[0] if all(place in values for values in seeds)]
    return {place: fmean(values[place] for values in seeds) for place in shared}


def stage_starts(methods: Sequence[Method]) -> list[tuple[float, str]]:
    """Where each stage but the first begins, and its name; nothing where runs differ in it."""
    found: set[tuple[tuple[float, str], ...]] = set()
    for method in methods:
        for seed in method.complete_seeds():
            before, starts = 0, []
            for stage, name in enumerate(method.stages, start=1):
                starts.append((float(before), name))
                before += method.runs[seed, stage].updates or 0
            found.add(tuple(starts[1:]))
    return list(found.pop()) if len(found) == 1 else []


def curve_title(name: str) -> str:
    """The name of a curve in words: `task/<name>/<metric>` and `drift/<name>` are taken apart."""
    kind, _, rest = name.partition("/")
    if kind == "drift" and rest:
        return f"{rest}: KL from base"
    task, slash, metric = rest.rpartition("/")
    return f"{task}: {metric}" if slash else name


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


def pareto(
    summaries: Sequence[Summary], styles: Mapping[str, Look], legend: bool = True
) -> Figure | None:
    """New tasks against retained abilities: a small point a seed, a big one a method.

    Up and to the right is better. Lines through the points are 95 % intervals over items. Where all
    are of one plan, a dotted line joins the means that no other surpasses in both.

    Args:
        summaries: Base and methods.
        styles: Of `looks`.
        legend: Whether the figure has one.

    Returns:
        None where no run has both figures.
    """
    figure, axes = panel()
    means: list[tuple[float, float]] = []
    for each in summaries:
        look = styles[each.label]
        for point in each.points:
            if point.new and point.retained and not each.is_base():
                _cross(axes, point.retained, point.new, look, 3.5, 0.45)
        if each.new and each.retained:
            _cross(axes, each.retained.estimate, each.new.estimate, look, 9, 1.0, look.legend)
            means.append((each.retained.estimate.value, each.new.estimate.value))
    if not means:
        return None
    if len({each.plan for each in summaries}) == 1:
        front = _front(means)
        axes.plot(*_percent(front), ":", color=MUTED, linewidth=1.2, zorder=1)
    axes.set(xlabel="retained abilities, %", ylabel="new tasks, %")
    axes.set_title("New tasks against retained abilities")
    if legend:
        add_legend(figure, axes)
    return figure


def _cross(
    axes: Any,
    x: Estimate,
    y: Estimate,
    look: Look,
    size: float,
    alpha: float,
    label: str | None = None,
) -> None:
    errors = [
        None
        if e.low is None or e.high is None
        else [[100 * (e.value - e.low)], [100 * (e.high - e.value)]]
        for e in (x, y)
    ]
    axes.errorbar(
        100 * x.value,
        100 * y.value,
        xerr=errors[0],
        yerr=errors[1],
        marker=look.marker,
        markersize=size + 4 * (look.marker == "*"),
        color=look.colour,
        alpha=alpha,
        elinewidth=1.6 if label else 0.7,
        linestyle="none",
        zorder=3 if label else 2,
        label=label,
    )


def _front(means: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other surpasses in one figure without falling behind in the other."""
    return sorted(
        (x, y)
        for x, y in set(means)
        if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in means)
    )


def _percent(front: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [100 * x for x, _ in front], [100 * y for _, y in front]


def curve(
    name: str,
    lines: Sequence[Line],
    starts: Sequence[tuple[float, str]],
    styles: Mapping[str, Look],
    legend: bool = True,
) -> Figure:
    """One measured thing over the optimizer steps of all stages.

    Args:
        name: What was measured.
        lines: Of `learning_curves`: thin for seeds, thick for means.
        starts: Of `stage_starts`: where stages begin.
        styles: Of `looks`.
        legend: Whether the figure has one.
    """
    figure, axes = panel()
    share = name.endswith("/accuracy")
    labelled: set[str] = set()
    for line in lines:
        look, mean = styles[line.label], line.seed is None
        axes.plot(
            line.steps,
            [100 * value for value in line.values] if share else line.values,
            linestyle=look.dash,
            marker=look.marker if mean else "",
            markersize=4,
            color=look.colour,
            linewidth=1.8 if mean else 0.8,
            alpha=1.0 if mean else 0.5,
            label=None if line.label in labelled else look.legend,
        )
        labelled.add(line.label)
    for step, stage in starts:
        axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.annotate(
            stage,
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            rotation=90,
            verticalalignment="top",
            fontsize=7,
            color=MUTED,
        )
    unit = "%" if share else "nats a token" if name.startswith("drift/") else ""
    axes.set(xlabel="optimizer steps", ylabel=unit)
    axes.set_title(curve_title(name))
    if legend:
        add_legend(figure, axes)
    return figure


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
