"""Token ids in one array: rows come back as they were, in a tenth of the memory."""

from __future__ import annotations

import tracemalloc

import pytest

from sdft_lightning.data.tokens import TokenizedRow, TokenStore, stored
from sdft_lightning.types import Demonstration


def row(number: int) -> TokenizedRow:
    """A row whose lists have all lengths, none among them."""
    asked = Demonstration(str(number), [], [], None, None, f"row {number}")
    ids = [list(range(1000 * number, 1000 * number + length)) for length in (number, 3, 0, 1)]
    return TokenizedRow(asked, *ids)


ROWS = [row(number) for number in range(5)]


def test_rows_come_back_as_they_were() -> None:
    found = TokenStore(ROWS)
    assert len(found) == 5
    assert list(found) == ROWS
    assert [found[-1], found[0]] == [ROWS[4], ROWS[0]]
    assert found[1:4:2] == [ROWS[1], ROWS[3]]
    assert found.demonstrations == [each.row for each in ROWS]
    assert found.lengths() == [(number, 3, 0, 1) for number in range(5)]
    assert stored(found) is found
    with pytest.raises(IndexError):
        found[5]
    assert list(TokenStore()) == []


def test_an_id_beyond_16_bits_widens_the_others() -> None:
    rows = [*ROWS, ROWS[0]._replace(prompt_ids=[5, 65_535, 65_536, 7]), ROWS[3]]
    assert list(TokenStore(rows)) == rows


@pytest.mark.parametrize(("first", "bytes_"), [(1000, 2), (100_000, 4)])
def test_ids_take_two_bytes_each_or_four(first: int, bytes_: int) -> None:
    ids = [first + place % 1000 for place in range(100_000)]
    tracemalloc.start()
    found = TokenStore([TokenizedRow(ROWS[0].row, ids, [], [])])
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0].prompt_ids == ids
    assert size < 100_000 * (bytes_ + 1)
