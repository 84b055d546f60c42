"""Results files to records, and what was wrong with the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sdft_lightning.continual.report.records import FORMAT, Record, parse_record
from sdft_lightning.errors import UserError
from sdft_lightning.errors.foreign_text import printable


class Problem(NamedTuple):
    """Something that a reader of the report must know.

    Attributes:
        kind: One or two words.
        text: A sentence: what, where, and what the report did about it.
        note: Whether all figures are the same as without it.
    """

    kind: str
    text: str
    note: bool = False


def read_records(paths: Sequence[Path]) -> tuple[list[Record], list[Problem]]:
    """Read results files, in the order given.

    Args:
        paths: JSON Lines files that `continual` wrote; one that is given twice is read once.

    Returns:
        The records, and what was left out: a last line that is cut short (the run was stopped while
        it wrote), and records of other format versions.

    Raises:
        UserError: If a file is absent, empty or malformed, or has no record that can be read.
    """
    if not paths:
        raise UserError("report: no results file was given. Name one, or several: RESULTS...")
    records: list[Record] = []
    problems: list[Problem] = []
    for path in {path.resolve(): path for path in paths}.values():
        versions: dict[str, list[int]] = {}
        for number, raw in _objects(path, problems):
            if raw.get("format") != FORMAT or isinstance(raw["format"], bool):
                versions.setdefault(repr(raw.get("format")), []).append(number)
            else:
                records.append(parse_record(raw, f"{path}, line {number}"))
        problems += [
            Problem(
                "unknown format",
                f"{path}: {len(lines)} records (lines {_listed(lines)}) have format {version}; "
                f"this version reads {FORMAT}. They were left out: make the report with the "
                "version that wrote them.",
            )
            for version, lines in versions.items()
        ]
    if not records:
        why = " ".join(problem.text for problem in problems)
        raise UserError(f"report: there is no record to report. {why}")
    return records, problems


def _objects(path: Path, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and JSON objects of a file; a torn last line becomes a problem."""
    # Not `splitlines`: names may hold characters that it takes for line ends (U+2028, say).
    lines = _content(path).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line.decode("utf-8"), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            cut = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
            if cut and number == len(lines):
                problems.append(
                    Problem(
                        "torn line",
                        f"{path}, line {number}: the last line is cut short; the run was probably "
                        "stopped while it wrote. The record was left out.",
                    )
                )
                return
            raise UserError(
                f"{path}, line {number}: malformed JSON ({printable(str(error))}). Each line "
                "holds one record; "
                "correct the line, or take it out."
            ) from error
        if not isinstance(raw, dict):
            raise UserError(
                f"{path}, line {number}: a record is a JSON object; got {type(raw).__name__}. Is "
                "this a results.jsonl of `continual`?"
            )
        yield number, raw


def _content(path: Path) -> bytes:
    if path.is_dir():
        inside = path / "results.jsonl"
        remedy = f"Name {inside}." if inside.is_file() else "Name a results.jsonl file."
        raise UserError(f"report: {path} is a folder. {remedy}")
    if not path.is_file():
        raise UserError(f"report: there is no file {path}. Correct the path.")
    content = path.read_bytes()
    if not content.strip():
        raise UserError(f"report: {path} is empty: no run has ended yet, or it is another file.")
    return content


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _listed(lines: list[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:5])
    return shown if len(lines) <= 5 else f"{shown}, ..."
