"""Chat messages that stand in a column as text: JSON, or as Python writes lists."""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Sequence
from typing import Any

from sdft_lightning.data.bounded_rows import Rows
from sdft_lightning.errors import UserError

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
