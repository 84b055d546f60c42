"""Results files to numbers for JSON, tables, plots, one page and TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from markupsafe import Markup

from sdft_lightning.continual.report.comparisons import Comparisons
from sdft_lightning.continual.report.looks import INK, SERIES, Look
from sdft_lightning.continual.report.plots import Picture
from sdft_lightning.continual.report.records import Problem, read_records
from sdft_lightning.continual.report.results import Results, gather
from sdft_lightning.continual.report.summary import Summary
from sdft_lightning.continual.report.tables import Table, as_markdown, markdown_text

if TYPE_CHECKING:
    from sdft_lightning.continual.report.comparisons import Comparisons
    from sdft_lightning.continual.report.summary import Summary


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


def report_numbers(
    results: Results, summaries: Sequence[Summary], comparisons: Comparisons
) -> dict[str, Any]:
    """Everything that was computed, as plain values."""
    return {
        "problems": [problem._asdict() for problem in results.problems],
        "methods": [_summary_numbers(each) for each in summaries],
        "tests": [_plain(each) for each in comparisons.pooled],
        "mcnemar": [_plain(each) for each in comparisons.by_seed],
        "untested": list(comparisons.untested),
    }


def _summary_numbers(summary: Summary) -> dict[str, Any]:
    numbers: dict[str, Any] = _plain(summary)
    numbers["matrix"] = [
        {"stage": stage, "name": summary.columns[i].name, **cell._asdict()}
        for (stage, i), cell in summary.matrix.items()
    ]
    return numbers


def _plain(value: Any) -> Any:
    """Named tuples as objects, tuples as lists, nan as null."""
    if hasattr(value, "_asdict"):
        return {key: _plain(each) for key, each in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_report(results_files: Sequence[Path], output_dir: Path) -> Path:
    """Compute and write everything; print the summary and all that is missing or odd.

    Args:
        results_files: JSON Lines files of `continual`.
        output_dir: Where to write; where it holds files already, the next free name.

    Returns:
        The folder.

    Raises:
        UserError: If a results file cannot be read.
    """
    results = gather(*read_records(results_files))
    # What computes and draws takes seconds to import; wrong files have been refused by now.
    from sdft_lightning.continual.report.comparisons import compare
    from sdft_lightning.continual.report.content import all_tables
    from sdft_lightning.continual.report.events import write_events
    from sdft_lightning.continual.report.looks import looks
    from sdft_lightning.continual.report.plots import draw
    from sdft_lightning.continual.report.summary import summarise

    summaries = summarise(results)
    comparisons = compare(results)
    tables = all_tables(results, summaries, comparisons)
    styles = looks(summaries)
    pictures = draw(results, summaries, styles)
    report = Report(
        sources=tuple(str(path) for path in results_files),
        facts=_facts(results),
        problems=results.problems,
        remarks=_remarks(summaries, comparisons, bool(pictures["curves"])),
        tables=tables,
        pictures=pictures,
        looks=styles,
    )
    folder = _new_folder(output_dir)
    _write(folder, report)
    write_events(_made(folder / "tensorboard"), results, summaries, pictures)
    numbers = report_numbers(results, summaries, comparisons)
    (folder / "report.json").write_text(
        json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    _announce(report, folder)
    return folder


def _new_folder(wanted: Path) -> Path:
    """The folder, made; an empty one may be there already."""
    from sdft_lightning.files.run_folder import unused_path

    if not (wanted.is_dir() and not any(wanted.iterdir())):
        wanted = unused_path(wanted)
    return _made(wanted)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(folder: Path, report: Report) -> None:
    from sdft_lightning.continual.report.looks import save
    from sdft_lightning.continual.report.tables import as_latex, as_markdown

    (folder / "index.html").write_text(as_page(report), encoding="utf-8")
    (folder / "report.md").write_text(as_report_markdown(report), encoding="utf-8")
    texts = _made(folder / "tables")
    for table in (table for group in report.tables.values() for table in group):
        (texts / f"{table.key}.md").write_text(as_markdown(table), encoding="utf-8")
        (texts / f"{table.key}.tex").write_text(as_latex(table), encoding="utf-8")
    plots = _made(folder / "plots")
    for picture in (picture for group in report.pictures.values() for picture in group):
        save(picture.figure, plots, picture.name)


def _facts(results: Results) -> str:
    """What the files hold, in a sentence or two."""
    parts = []
    for method in results.methods:
        stages = len(method.stages)
        done, count = len(method.complete_seeds()), len(method.seeds)
        seeds = ", ".join(str(seed) for seed in method.seeds)
        parts.append(
            f"{method.label}: {done} of {count} seeds ({seeds}) complete over {stages} "
            f"stage{'s' if stages > 1 else ''}"
        )
    return ("; ".join(parts) or "Only the base model was measured") + "."


def _remarks(
    summaries: Sequence[Summary], comparisons: Comparisons, curves: bool
) -> dict[str, tuple[str, ...]]:
    """Why a part of the report is absent."""
    found: dict[str, tuple[str, ...]] = {}
    if not any(each.new and each.retained for each in summaries):
        found["summary"] = (
            "There is no plot of new tasks against retained abilities: no complete run has both.",
        )
    if summaries and all(len(each.stages) == 1 for each in summaries):
        found["forgetting"] = ("Forgetting and transfer take two stages; the plan has one.",)
    if not curves:
        found["curves"] = ("No run recorded a learning curve.",)
    untested = tuple(f"Not tested: {text}." for text in comparisons.untested)
    if not comparisons.pooled and not untested:
        untested = ("Nothing could be tested: that takes two complete sides of one plan.",)
    if untested:
        found["tests"] = untested
    return found


def _announce(report: Report, folder: Path) -> None:
    from sdft_lightning.continual.report.tables import as_text

    for table in report.tables["summary"][:1]:
        print(f"{as_text(table)}\n")
    for problem in report.problems:
        print(_line(problem))
    if all(problem.note for problem in report.problems):
        print(COMPLETE)
    print(f"Report: {folder / 'index.html'}   TensorBoard: --logdir {folder / 'tensorboard'}")


def _line(problem: Problem) -> str:
    return f"{'note' if problem.note else 'WARNING'}: {problem.kind}: {problem.text}"
