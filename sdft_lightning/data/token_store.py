"""Tokenized rows in little memory: all token ids of a set in one array."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, overload

from sdft_lightning.types import Demonstration

_KINDS = 4  # prompt, teacher prompt, demonstration, context


class TokenizedRow(NamedTuple):
    """A row with its token ids.

    Teacher prompt and demonstration are empty where there is no demonstration; the context is empty
    where it is not trained on, and the only one that is not where it is.
    """

    row: Demonstration
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    demonstration_ids: list[int]
    context_ids: Sequence[int] = ()


class TokenStore(Sequence[TokenizedRow]):
    """A list of tokenized rows, whose ids become lists when a row is looked at.

    A list holds each id as an object of its own, ten times the memory: of 200,000 rows of 300 bytes
    two gigabytes.

    Args:
        rows: The first rows.
    """

    def __init__(self, rows: Iterable[TokenizedRow] = ()) -> None:
        self._rows: list[Demonstration] = []
        self._ids = array("H")  # of 16 bits, as long as all ids are below 65,536
        self._ends = array("q", [0])  # of each kind of each row, in `_ids`
        for row in rows:
            self.append(row)

    def append(self, tokens: TokenizedRow) -> None:
        """Keep one more row."""
        self._rows.append(tokens.row)
        for ids in tokens[1:]:
            known = ids if isinstance(ids, list) else list(ids)
            try:
                self._ids.fromlist(known)  # all of them or none
            except OverflowError:
                self._ids = array("i", self._ids)
                self._ids.fromlist(known)
            self._ends.append(len(self._ids))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedRow]: ...
    def __getitem__(self, index: int | slice) -> TokenizedRow | list[TokenizedRow]:
        """A row with its ids, or a list of such rows."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self._rows[index]
        first = index % len(self._rows) * _KINDS
        ends = self._ends[first : first + _KINDS + 1]
        prompt, teacher, target, context = (
            self._ids[start:end].tolist() for start, end in pairwise(ends)
        )
        return TokenizedRow(row, prompt, teacher, target, context)

    def __eq__(self, other: object) -> bool:
        """Whether another list holds the same rows."""
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment] # it grows

    @property
    def demonstrations(self) -> list[Demonstration]:
        """The rows without their ids."""
        return list(self._rows)

    def lengths(self) -> list[tuple[int, int, int, int]]:
        """Tokens of prompt, teacher prompt, demonstration and context of each row."""
        counts = [end - start for start, end in pairwise(self._ends)]
        kinds = [counts[kind::_KINDS] for kind in range(_KINDS)]
        return list(zip(kinds[0], kinds[1], kinds[2], kinds[3], strict=True))


def stored(rows: Iterable[TokenizedRow]) -> TokenStore:
    """Rows as a store, the same one where they are one."""
    return rows if isinstance(rows, TokenStore) else TokenStore(rows)
