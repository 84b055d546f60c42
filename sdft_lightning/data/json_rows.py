"""Rows of JSON files, read one after the other, so that none takes more memory than allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sdft_lightning.data.bounded_rows import MAX_ROW_BYTES, Reading, RowList, Rows
from sdft_lightning.errors import UserError
from sdft_lightning.errors.foreign_text import printable

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
