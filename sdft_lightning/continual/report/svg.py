"""Figures to files, and to SVG that takes a page's own colours and fonts."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from sdft_lightning.continual.report.looks import INK, MUTED, RULE, SERIES, plain_text

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
