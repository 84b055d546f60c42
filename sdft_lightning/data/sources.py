"""Rows of a data set: JSON Lines, Parquet, `save_to_disk` folders, or the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from sdft_lightning.errors import UserError
from sdft_lightning.foreign_text import printable

EXAMPLE_PREFIX = "example:"
_EXAMPLES = Path(__file__).parent / "examples"
_LONE_HALF = re.compile("[\ud800-\udfff]")
_SUFFIXES = (".jsonl", ".json", ".parquet")


class HubSource(TypedDict):
    """A data set on the Hugging Face Hub.

    Not a dataclass: for these jsonargparse takes the path of a file to hold their options, and a
    data file given on the command line would be read as one.

    Args:
        repo: owner/name.
        split: Which split, e.g. train.
        config: Which configuration, where there are several.
        revision: Branch, tag or commit.
    """

    repo: str
    split: str
    config: NotRequired[str | None]
    revision: NotRequired[str | None]


Source = str | HubSource


class Rows(NamedTuple):
    """Raw rows and where they came from.

    Attributes:
        name: File or data set, for messages.
        rows: One dict a row.
        places: `line n` or `row n` of each, for messages.
    """

    name: str
    rows: list[dict[str, Any]]
    places: list[str]


def read_rows(source: Source, option: str) -> Rows:
    """Read all rows of a source.

    Args:
        source: A .jsonl, .json or .parquet file, a folder written by `save_to_disk` (its split
            behind a colon if it has several), `example:<name>/<file>` for a data set that this
            package ships, or a `HubSource`.
        option: Name of the option, for messages.

    Returns:
        At least one row.

    Raises:
        UserError: If there is no such source, or it is malformed or empty.
    """
    found = _read(source, option) if isinstance(source, str) else _read_hub(source, option)
    if not found.rows:
        raise UserError(f"{option}: {found.name} has no rows. Give a file with at least one.")
    return found


def _read(source: str, option: str) -> Rows:
    path, split = _resolve(source, option)
    if path.is_dir():
        return _read_folder(path, split, option)
    if path.suffix == ".parquet":
        return _read_parquet(path, option)
    if path.suffix not in _SUFFIXES:
        raise UserError(
            f"{option}: {path} ends in {path.suffix or 'nothing'}; allowed are "
            f"{', '.join(_SUFFIXES)}, and folders written by save_to_disk. Convert or rename it."
        )
    return _read_json(path)


def _resolve(source: str, option: str) -> tuple[Path, str | None]:
    if source.startswith(EXAMPLE_PREFIX):
        return example_path(source, option), None
    path = Path(source).expanduser()
    if path.exists():
        return path, None
    folder, _, split = source.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return Path(folder).expanduser(), split
    raise UserError(
        f"{option}: there is no file or folder {source} (looked in {Path.cwd()}). Correct the "
        "path; a data set on the Hub is given as {repo: owner/name, split: train}."
    )


def example_path(source: str, option: str) -> Path:
    """The file of a data set that this package ships.

    Args:
        source: `example:<name>/<file>`.
        option: Where it was named.

    Raises:
        UserError: If it ships no such file.
    """
    path = _EXAMPLES / source.removeprefix(EXAMPLE_PREFIX)
    if not path.is_file():
        known = sorted(p.relative_to(_EXAMPLES).as_posix() for p in _EXAMPLES.rglob("*.jsonl"))
        raise UserError(f"{option}: this package ships no {source!r}. It ships {', '.join(known)}.")
    return path


def _read_json(path: Path) -> Rows:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _from_list(path, _parse(text, f"{path}"))
    rows, places = [], []
    # Not splitlines(): that also cuts at characters that JSON strings may hold, like U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_parse(line, f"{path}, line {number}"))
            places.append(f"line {number}")
    return Rows(
        str(path), [_as_dict(row, path, at) for row, at in zip(rows, places, strict=True)], places
    )


def _from_list(path: Path, rows: Any) -> Rows:
    places = [f"row {number}" for number in range(1, len(rows) + 1)]
    return Rows(
        str(path), [_as_dict(row, path, at) for row, at in zip(rows, places, strict=True)], places
    )


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"{where}: malformed JSON{column}: {printable(str(error))}. Each line must be one "
            "JSON object."
        ) from error
    # Half of a pair like \\ud83d\\ude00 is no character: it can be neither tokenized nor written.
    if "\\ud" in text.lower() and _LONE_HALF.search(json.dumps(value, ensure_ascii=False)):
        raise UserError(
            f"{where}: a lone surrogate (\\ud800 to \\udfff), half of a character. Write the "
            "character itself, or both halves."
        )
    return value


def _as_dict(row: Any, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(
            f"{path}, {place}: expected a JSON object with named columns, got "
            f"{type(row).__name__}. Write each row as {{...}}."
        )
    return row


def _read_parquet(path: Path, option: str) -> Rows:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{option}: {path} cannot be read as Parquet: {printable(str(error))}"
        ) from error
    return Rows(str(path), rows, [f"row {number}" for number in range(1, len(rows) + 1)])


def _read_folder(path: Path, split: str | None, option: str) -> Rows:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"{option}: the folder {path} was not written by datasets' save_to_disk "
            f"({printable(str(error))}). "
            "Name a file in it, or save it again."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(
                f"{option}: {path} has the splits {printable(', '.join(found))}; got {split!r}. "
                f"Write the split behind a colon: {path}:{next(iter(found))}."
            )
        found = found[split]
    rows = list(found)
    return Rows(str(path), rows, [f"row {number}" for number in range(1, len(rows) + 1)])


def _read_hub(source: HubSource, option: str) -> Rows:
    import datasets

    repo, split, config = source["repo"], source["split"], source.get("config")
    try:
        found = datasets.load_dataset(repo, config, split=split, revision=source.get("revision"))
    except Exception as error:  # the Hub client raises many unrelated kinds
        raise UserError(
            f"{option}: the data set {repo} (config {config}, split {split}) "
            f"could not be loaded: {type(error).__name__}: {printable(str(error))} Check the "
            "names and the "
            "network, or download it and give the path of the file."
        ) from error
    rows = list(found)
    name = f"{repo}, split {split}"
    return Rows(name, rows, [f"row {number}" for number in range(1, len(rows) + 1)])
