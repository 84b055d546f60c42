"""Rows of JSON files, one after the other, in bounded memory; messages that stand there as text."""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sdft_lightning.errors import UserError, printable

# Most text of one row in bytes: some four million tokens, more than any model reads.
MAX_ROW_BYTES = 16 * 2**20
# Most memory for the rows of one set: some 60 million tokens of text.
MAX_MEGABYTES = 256


class Rows(NamedTuple):
    """Raw rows and where they came from.

    Attributes:
        name: File or data set, for messages.
        rows: One dict a row.
        places: `line n` or `row n` of each, for messages.
        columns: All columns of the set, also those that were not read.
    """

    name: str
    rows: list[dict[str, Any]]
    places: list[str]
    columns: Collection[str] = ()


class Reading(NamedTuple):
    """How a set is read.

    Attributes:
        option: Name of the option that names the set, for messages.
        wanted: The columns to read; all of them where it is None.
        max_megabytes: Most memory for the rows that are read.
    """

    option: str
    wanted: Collection[str] | None = None
    max_megabytes: int = MAX_MEGABYTES

    @property
    def max_bytes(self) -> int:
        """Most memory in bytes."""
        return self.max_megabytes * 2**20

    def columns(self, present: Iterable[str]) -> list[str]:
        """The columns to read of those that a set has, in the set's order."""
        return [name for name in present if self.wanted is None or name in self.wanted]

    def too_large(self, name: str, what: str) -> UserError:
        """What to tell of a set that takes more memory than allowed."""
        return UserError(
            f"{self.option}: {name}: {what} more than {self.max_megabytes} MB of memory. Give "
            "fewer rows, or allow more with --data.max_megabytes if this machine has it."
        )


class RowList:
    """Collects the rows of a set and refuses more than fits.

    Args:
        name: File or data set, for messages.
        reading: What is read of it.
    """

    def __init__(self, name: str, reading: Reading) -> None:
        self._name = name
        self._reading = reading
        self._rows: list[dict[str, Any]] = []
        self._places: list[str] = []
        self._columns: dict[str, None] = {}
        self._bytes = 0

    def add(self, row: dict[str, Any], place: str) -> None:
        """Keep what is wanted of a row.

        Args:
            row: The row.
            place: `line n` or `row n`.

        Raises:
            UserError: If the rows now take more memory than allowed.
        """
        self._columns.update(dict.fromkeys(row))
        wanted = self._reading.wanted
        if wanted is not None:
            # The names are those of `wanted`, so that all rows share them.
            row = {name: row[name] for name in wanted if name in row}
        self._bytes += memory_of(row)
        if self._bytes > self._reading.max_bytes:
            raise self._reading.too_large(
                self._name, f"the rows up to {place} take, as they are read,"
            )
        self._rows.append(row)
        self._places.append(place)

    def rows(self, columns: Iterable[str] = ()) -> Rows:
        """All rows.

        Args:
            columns: Columns that the set has besides those of the rows.
        """
        named = [*self._columns, *(name for name in columns if name not in self._columns)]
        return Rows(self._name, self._rows, self._places, named)


def memory_of(value: Any) -> int:
    """Bytes that a value of dicts, lists, texts and numbers takes; what is shared counts again."""
    total, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        total += sys.getsizeof(each)
        if isinstance(each, dict):
            waiting.extend(each.values())
        elif isinstance(each, list | tuple):
            waiting.extend(each)
    return total


log = logging.getLogger(__name__)

_LONGEST_LITERAL = 2**20

ROLES = ("system", "user", "assistant", "tool")


def messages_from_json(found: Rows, columns: Sequence[str]) -> Rows:
    """The rows with messages in the place of texts that are nothing but such; told once a column.

    Args:
        found: The raw rows.
        columns: Names of the columns that are looked at.

    Raises:
        UserError: If the messages of a row hold half of a character.
    """
    rows = list(found.rows)
    for name in columns:
        places = []
        for place, row in enumerate(rows):
            messages = _messages(row.get(name))
            if messages is not None:
                _check_characters(messages, f"{found.name}, {found.places[place]}", name)
                places.append(place)
                rows[place] = {**row, name: messages}
        if places:
            log.warning(
                f"{found.name}: column {name!r} holds chat messages as text in {len(places)} of "
                f"{len(rows)} rows (the first: {found.places[places[0]]}); they are read as "
                "messages."
            )
    return found._replace(rows=rows)


def _check_characters(messages: list[dict[str, Any]], origin: str, column: str) -> None:
    try:
        json.dumps(messages, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{origin}: the messages in column {column!r} have a lone surrogate (\\ud800 to "
            "\\udfff), half of a character. Write the character itself, or both halves."
        ) from error


def _messages(value: Any) -> list[dict[str, Any]] | None:
    """The messages that a text is, or that a list of texts holds; None if it is another text."""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        parts = [_messages(part) for part in value]
        whole = [message for part in parts if part is not None for message in part]
        return whole if all(part is not None for part in parts) else None
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{") or "role" not in value:
        return None
    found = _parsed(value.strip())
    messages = [found] if isinstance(found, dict) else found
    if not isinstance(messages, list) or not messages:
        return None
    return messages if all(_is_message(message) for message in messages) else None


def _parsed(text: str) -> Any:
    """The value that a text writes; None where it writes none."""
    # A tree of Python's syntax takes some hundred times the memory of its text.
    parsers = (json.loads, ast.literal_eval) if len(text) < _LONGEST_LITERAL else (json.loads,)
    for parse in parsers:
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and "content" in value


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONE_HALF = re.compile("[\ud800-\udfff]")
# A string (also one that is never closed), or what opens, closes and separates.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)


def read_json(path: Path, reading: Reading) -> Rows:
    """Read JSON Lines, or a .json file that holds an array.

    Args:
        path: The file.
        reading: What is read of it.

    Raises:
        UserError: Names the file and the line or row that is malformed or too long.
    """
    found = RowList(str(path), reading)
    with path.open("rb") as file:
        start = 3 if file.read(3) == _BYTE_ORDER_MARK else 0
        file.seek(start)
        if path.suffix == ".json" and _first_character(file) == b"[":
            file.seek(0, 2)
            if file.tell() > reading.max_bytes:
                raise reading.too_large(str(path), "the file takes")
            file.seek(start)
            texts = _elements(file.read(), start, str(path))
        else:
            file.seek(start)
            texts = _lines(file, start, str(path))
        for place, text, offset in texts:
            row = _parse(_decoded(text, path, offset), f"{path}, {place}")
            found.add(_as_dict(row, path, place), place)
    return found.rows()


def _first_character(file: BinaryIO) -> bytes:
    while piece := file.read(2**16):
        if piece.strip():
            return piece.lstrip()[:1]
    return b""


def _lines(file: BinaryIO, offset: int, name: str) -> Iterator[tuple[str, bytes, int]]:
    """Place, text and offset of each line that is not blank."""
    number = 0
    # Only b"\n" ends a line: JSON strings may hold other separators, like U+2028.
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise _too_long(f"{name}, line {number}")
        if line.strip():
            yield f"line {number}", line.removesuffix(b"\n"), offset
        offset += len(line)


def _elements(text: bytes, offset: int, name: str) -> Iterator[tuple[str, bytes, int]]:
    """Place, text and offset of each element of an array, malformed ones included."""
    number, depth, start = 1, 0, 0
    for token in _TOKEN.finditer(text):
        sign = token[0]
        if depth and token.end() - start > MAX_ROW_BYTES:
            raise _too_long(f"{name}, row {number}")
        ends = depth == 1 and sign in (b",", b"]")
        if ends and (sign == b"," or number > 1 or text[start : token.start()].strip()):
            yield f"row {number}", text[start : token.start()], offset + start
        if ends or (depth == 0 and sign == b"["):
            number, start = number + (sign == b","), token.end()
        depth += (sign in (b"[", b"{")) - (sign in (b"]", b"}"))
        if depth <= 0:
            break
    if depth > 0 or text[start:].strip():
        what = "the array is never closed" if depth > 0 else "something stands behind the array"
        raise UserError(f"{name}, row {number}: malformed JSON: {what}. Write [{{...}}, {{...}}].")


def _too_long(where: str) -> UserError:
    return UserError(
        f"{where}: more than {MAX_ROW_BYTES // 2**20} MB in one row, which is more than any model "
        "reads. Leave the row out, or take what is not text (pictures, sound) out of it."
    )


def _decoded(text: bytes, path: Path, offset: int) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UserError(f"{path}: not UTF-8 at byte {at}. Save it as UTF-8.") from error


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
