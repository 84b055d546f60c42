"""The report as one HTML page and as Markdown, with how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from sdft_lightning.continual.report.looks import INK, SERIES, Look
from sdft_lightning.continual.report.plots import Picture
from sdft_lightning.continual.report.records import Problem
from sdft_lightning.continual.report.tables import Table, as_markdown, markdown_text

GUIDE: tuple[tuple[str, str], ...] = (
    (
        "New tasks",
        "Mean accuracy over the tasks of all stages, after the last stage.",
    ),
    (
        "Retained",
        "Mean over the held-out abilities, none of which is trained on. Ability by ability "
        "they are the last columns of the forgetting matrices. Figures that are no shares "
        "(perplexities, say) are left out of the mean.",
    ),
    (
        "95 % interval",
        "Over items: what these models would score on other items of the same kind. It is the "
        "recorded one (Wilson's for accuracies), that of several sets is combined from theirs "
        "(Zou and Donner 2008), and over seeds its ends are averaged, since the items are the "
        "same. It does not say what other seeds would do: SD, the standard deviation over "
        "seeds, does.",
    ),
    (
        "Average accuracy",
        "ACC = 1/T Σ R[T, j], with R[i, j] the accuracy on task j after stage i of T (Lopez- "
        "Paz and Ranzato 2017).",
    ),
    (
        "Backward transfer",
        "BWT = 1/(T − 1) Σ over j < T of R[T, j] − R[j, j]; below 0 where later stages harmed "
        "earlier tasks (Lopez-Paz and Ranzato 2017).",
    ),
    (
        "Forward transfer",
        "FWT = 1/(T − 1) Σ over j > 1 of R[j − 1, j] − b[j]; above 0 where earlier stages "
        "helped. b is the accuracy of the base model, which takes the place of the random "
        "weights in the source (Lopez-Paz and Ranzato 2017).",
    ),
    (
        "Forgetting",
        "F = 1/(T − 1) Σ over j < T of max R[l, j] − R[T, j], the best over stages 1 to T − "
        "1; below 0 for a gain (Chaudhry et al. 2018).",
    ),
    (
        "Tests over all seeds",
        "Models of all seeds answer the same items, so items are drawn, each with all its "
        "seeds: a paired bootstrap gives the interval, a sign-flip (permutation) test on the "
        "items' mean differences gives p. Counting every seed's answers as new items would "
        "make p too small.",
    ),
    (
        "McNemar's test",
        "For one seed: of the items that only one model has right, how many are the first's? "
        "Exact.",
    ),
    (
        "Holm",
        "p corrected for the number of comparisons in the table (Holm 1979): if the corrected "
        "p is at most 0.05 for some of them, the chance that any is a false alarm is at most "
        "5 %.",
    ),
)


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
