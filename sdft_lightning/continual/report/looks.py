"""How methods look in all plots, and how figures become files and SVG with a page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
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


_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)},
}
# matplotlib's own, which would hold for the whole page, and what says nothing to its reader.
_LEFT_OUT = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_ID = re.compile(r'(\bid="|url\(#|href="#)')


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write <name>.png and <name>.svg; text in the SVG is drawn, so that no font is needed.

    Args:
        figure: What to write.
        folder: Where; it exists.
        name: Of the files.
    """
    with plain_text(**{"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.png", dpi=160)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def inline_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an element of a page.

    Colours become the page's variables (so that it follows light and dark), text stays text, ids
    get the name before them (so that several figures live in one page).

    Args:
        figure: What to draw.
        name: Unique in the page; letters, digits and hyphens.
        title: Its name, for those who cannot see it.
        description: What it shows, for the same.
    """
    file = io.StringIO()
    with plain_text(**{"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    head, _, body = drawn[drawn.index("<svg") :].partition(">")
    box = re.search(r'viewBox="[^"]+"', head)
    body = _TAG.sub(lambda tag: _own(tag.group(), name), _LEFT_OUT.sub("", body))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box.group() if box else ""} role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{body}'
    )


def _own(tag: str, name: str) -> str:
    """A tag with the page's colours, and ids that no other figure has."""
    tag = _ID.sub(rf"\g<1>{name}-", tag)
    for colour, variable in _COLOURS.items():
        tag = tag.replace(colour, variable)
    return tag
