"""Rows as they are read: only the columns that somebody asked for, and no more than fits."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from sdft_lightning.errors import UserError

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
