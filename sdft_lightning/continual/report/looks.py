"""How methods look in all plots, and what all plots share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sdft_lightning.continual.report.summary import Summary
from sdft_lightning.continual.report.tables import fewer

# Each colour stands once, so that a page can put its own in their places.
INK, MUTED, RULE = "#1b1f24", "#57606b", "#d5dae0"
# On white at least 4.5 : 1, and told apart also by marker and dash.
SERIES = (
    "#1a66b3",
    "#b84a00",
    "#1b7a4a",
    "#7a47b8",
    "#b0286f",
    "#0b7280",
    "#7c5a12",
    "#5d6168",
)
_MARKERS = "osD^vPXp"
_DASHES = ("-", "--", "-.", ":")
_PANEL = (4.6, 3.5)  # inches


class Look(NamedTuple):
    """How a method is drawn everywhere."""

    colour: str
    marker: str
    dash: str
    legend: str


def looks(summaries: Sequence[Summary]) -> dict[str, Look]:
    """A look for each method; the base is a star in ink."""
    found: dict[str, Look] = {}
    number = 0
    for each in summaries:
        if each.is_base():
            found[each.label] = Look(INK, "*", "-", each.label)
            continue
        around, place = divmod(number, len(SERIES))
        legend = each.label + fewer(len(each.complete), each.expected)
        # From the ninth on colours come again, with other markers and dashes.
        found[each.label] = Look(
            SERIES[place],
            _MARKERS[(place + around) % len(_MARKERS)],
            _DASHES[(place + around) % len(_DASHES)],
            legend,
        )
        number += 1
    return found


@contextmanager
def plain_text(**settings: Any) -> Iterator[None]:
    """Draw and save with names taken literally: a $ begins no formula."""
    look: Any = {
        "text.parse_math": False,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "font.size": 9,
        "grid.color": RULE,
        "legend.frameon": False,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        **settings,
    }
    with matplotlib.rc_context(look):
        yield


def panel(size: tuple[float, float] = _PANEL) -> tuple[Figure, Any]:
    """A figure of one panel, in inches, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def add_legend(figure: Figure, axes: Any) -> None:
    """Put a legend below the panel."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max((len(label) for label in labels), default=0) > 24 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
