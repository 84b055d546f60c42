"""Columns that are made of several, as in `prompt: "$question $choices"`."""

from __future__ import annotations

import dataclasses
from string import Template, ascii_uppercase
from typing import Any

from sdft_lightning.data.bounded_rows import Rows
from sdft_lightning.data.rows import Columns
from sdft_lightning.errors import UserError


def wanted_columns(columns: Columns) -> list[str]:
    """The columns of a file that a column map reads, those inside texts with `$` among them."""
    named = [name for name in dataclasses.astuple(columns) if name is not None]
    parts = [part for name in named for part in Template(name).get_identifiers()]
    return list(dict.fromkeys([*named, *parts]))


def compose(found: Rows, columns: Columns) -> Rows:
    """Fill in the columns whose names are texts with `$column` in them.

    Args:
        found: The raw rows.
        columns: The column map. A text of which a column is missing is left alone, so that it is
            told as a column that the file does not have.

    Returns:
        Rows that have a column by the name of each such text.

    Raises:
        UserError: Names the row whose value is no text.
    """
    for text in dict.fromkeys(dataclasses.astuple(columns)):
        if text is None or "$" not in text or text in found.columns:
            continue
        template = Template(text)
        if not template.is_valid():
            raise UserError(
                f"data.columns: a lone $ in {text!r}. Write $name for a column and $$ for a dollar "
                "sign."
            )
        parts = template.get_identifiers()
        if not parts or not set(parts) <= set(found.columns):
            continue
        for row, place in zip(found.rows, found.places, strict=True):
            where = f"{found.name}, {place}"
            values = {part: _text(row.get(part), part, where) for part in parts}
            row[text] = template.substitute(values)
    return found


def _text(value: Any, column: str, where: str) -> str:
    """A value as text; choices as one line each, with their letters."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    labels, texts = list(ascii_uppercase), value
    if isinstance(value, dict) and {"label", "text"} <= value.keys():  # as ARC and SciKnowEval
        labels, texts = value["label"], value["text"]
    is_list = isinstance(texts, list) and all(isinstance(each, str) for each in texts)
    if is_list and 0 < len(texts) <= len(labels):
        pairs = zip(labels, texts, strict=False)
        return "\n".join(f"{label}. {each}" for label, each in pairs)
    raise UserError(
        f"{where}: column {column!r} must be a text, a number, or choices (a list of texts, or "
        f"their text and label), got {type(value).__name__}. Correct it, or leave the row out."
    )
