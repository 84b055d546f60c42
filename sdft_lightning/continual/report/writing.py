"""Results files to numbers for JSON, tables, plots, a page and TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_lightning.continual.report.records import Problem, read_records
from sdft_lightning.continual.report.results import Results, gather

if TYPE_CHECKING:
    from sdft_lightning.continual.report.comparisons import Comparisons
    from sdft_lightning.continual.report.page import Report
    from sdft_lightning.continual.report.summary import Summary


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
    from sdft_lightning.continual.report.page import Report
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
    from sdft_lightning.continual.report.page import as_page, as_report_markdown
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
    from sdft_lightning.continual.report.page import COMPLETE
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
