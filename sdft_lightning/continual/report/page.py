"""The report as one HTML page, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from sdft_lightning.continual.report.guide import GUIDE
from sdft_lightning.continual.report.looks import INK, SERIES, Look
from sdft_lightning.continual.report.pictures import Picture
from sdft_lightning.continual.report.reading import Problem
from sdft_lightning.continual.report.tables import Table, as_markdown, markdown_text

SECTIONS: tuple[tuple[str, str, str], ...] = (
    ("summary", "Summary", ""),
    ("forgetting", "Forgetting and transfer", ""),
    (
        "curves",
        "Learning curves",
        "Thin lines are seeds, thick ones with marks are means where all seeds were measured; "
        "vertical lines are the starts of stages.",
    ),
    ("tests", "Paired tests", ""),
    ("runs", "Runs", ""),
)
COMPLETE = "Every method has a result of every stage with every seed."
_GLYPHS = {
    "*": "★",
    "o": "●",
    "s": "■",
    "D": "◆",
    "^": "▲",
    "v": "▼",
    "P": "✚",
    "X": "✖",
    "p": "⬟",
}


class Report(NamedTuple):
    """All that a page shows.

    Attributes:
        sources: The results files.
        facts: What they hold, in a sentence.
        problems: What a reader must know first.
        remarks: Comparisons that could not be made, and sections that are empty, with the reason.
        tables: By section.
        pictures: By section.
        looks: Of the methods.
    """

    sources: tuple[str, ...]
    facts: str
    problems: tuple[Problem, ...]
    remarks: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, Sequence[Table]]
    pictures: Mapping[str, Sequence[Picture]]
    looks: Mapping[str, Look]


def as_page(report: Report) -> str:
    """The page: one file that needs nothing else. All texts of users are escaped by the template.

    Args:
        report: What it shows.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    colours = {INK: "ink", **{colour: f"series-{i}" for i, colour in enumerate(SERIES, start=1)}}
    legend = [
        (colours[look.colour], _GLYPHS[look.marker], look.legend) for look in report.looks.values()
    ]
    svgs = {p.name: Markup(p.svg) for each in report.pictures.values() for p in each}
    return environment.get_template("page.html.jinja").render(
        report=report,
        sections=SECTIONS,
        complete=COMPLETE,
        guide=GUIDE,
        legend=legend,
        svgs=svgs,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
    )


def as_report_markdown(report: Report) -> str:
    """The same in Markdown, with its plots as linked files."""
    lines = ["# What was learned, and what was kept", "", markdown_text(report.facts), ""]
    lines += [f"From {', '.join(markdown_text(source) for source in report.sources)}.", ""]
    if report.problems:
        lines += ["## What is missing or odd", ""]
        lines += [f"- **{each.kind}**: {markdown_text(each.text)}" for each in report.problems]
    if all(problem.note for problem in report.problems):
        lines += [*([""] if report.problems else []), COMPLETE]
    for key, title, note in SECTIONS:
        pictures, tables = report.pictures.get(key, ()), report.tables.get(key, ())
        remarks = report.remarks.get(key, ())
        if not (pictures or tables or remarks):
            continue
        lines += ["", f"## {title}", ""]
        lines += [note, ""] if note else []
        for remark in remarks:
            lines += [markdown_text(remark), ""]
        for picture in pictures:
            alt = markdown_text(f"{picture.title}. {picture.description}")
            lines += [f"![{alt}](plots/{picture.name}.png)", ""]
        for table in tables:
            lines += [f"### {markdown_text(table.title)}", "", as_markdown(table)]
    lines += ["", "## How to read this", ""]
    lines += [f"- **{term}**: {markdown_text(text)}" for term, text in GUIDE]
    return "\n".join(lines) + "\n"
