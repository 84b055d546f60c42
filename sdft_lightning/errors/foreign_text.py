"""Text that servers, files and models send, made fit for messages: no secrets, no control codes."""

from __future__ import annotations

import json
import os
import re
from urllib.parse import quote

MOST_SHOWN = 300  # characters of a foreign text in a message
_HIDDEN = "***"
# Values of these variables are secrets, whoever sends them.
_SECRET_VARIABLE = re.compile(r"(API_?KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD)\Z", re.IGNORECASE)
_LEAST_SECRET = 8  # characters: a shorter value of such a variable may be a word, like "true"
_LEAST_KEY = 3  # of a key that was read on purpose
_USER_IN_URL = re.compile(r"(?<=://)[^\s/?#\"'<>]+@")

_keys: set[str] = set()


def key_from(variable: str) -> str | None:
    """The key in an environment variable; from now on `mask` hides it.

    Args:
        variable: Name of the variable.

    Returns:
        The key without white space around it; None where there is none.
    """
    key = os.environ.get(variable, "").strip()
    if len(key) >= _LEAST_KEY:
        _keys.add(key)
    return key or None


def mask(text: str) -> str:
    """A text with `***` for each known secret, and for user and password in a URL.

    Known are the keys that `key_from` has read, and the values of environment variables whose names
    end as those of secrets do (`..._API_KEY`, `..._TOKEN`). They are found as they are, and as JSON
    and URLs write them.
    """
    for secret in _secrets():
        for form in {secret, json.dumps(secret)[1:-1], quote(secret, safe="")}:
            if len(form) >= _LEAST_SECRET:
                text = text.replace(form, _HIDDEN)
            elif form in text:  # as a word of its own: a key "key" is no part of "monkey"
                text = re.sub(rf"(?<![^\W_]){re.escape(form)}(?![^\W_])", _HIDDEN, text)
    return _USER_IN_URL.sub(f"{_HIDDEN}@", text) if "@" in text else text


def harmless(text: str) -> str:
    """A masked text that any terminal may show: control codes but line ends become blanks.

    Args:
        text: Of any length; it is not cut.
    """
    text = mask(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def printable(text: str, most: int | None = MOST_SHOWN) -> str:
    """A foreign text for a message: one line, masked, without control codes, and cut.

    Args:
        text: What a server, a file or a model has written.
        most: Characters that are shown; all of them with None.
    """
    line = " ".join(mask(text).split())
    if most is not None:  # before the slower part; what is cut off here is masked already
        line = line[: 10 * most]
    return _cut(" ".join(harmless(line).split()), most)


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """A foreign value for a message, as Python writes it, and cut as by `printable`."""
    text = mask(repr(value))[: 10 * most]
    return _cut(harmless(text).replace("\n", " "), most)


def _cut(line: str, most: int | None) -> str:
    return line if most is None or len(line) <= most else f"{line[: most - 3]}..."


def _secrets() -> list[str]:
    """All known secrets, longest first: a short one may be the beginning of another."""
    found = set(_keys)
    for name, value in os.environ.items():
        if len(value) >= _LEAST_SECRET and _SECRET_VARIABLE.search(name):
            found.add(value.strip())
    return sorted(filter(None, found), key=len, reverse=True)
