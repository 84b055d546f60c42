"""The report's plots as matplotlib figures (no pyplot: nothing global, no display).

Each is small and holds one panel: pages lay them out, on a phone one below the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from sdft_lightning.continual.report.curves import Line, curve_title
from sdft_lightning.continual.report.estimates import Estimate
from sdft_lightning.continual.report.looks import MUTED, Look, add_legend, panel
from sdft_lightning.continual.report.summary import Summary


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
