"""Prompts made of several columns, and parts of Hub sets that have one split for all."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from sdft_lightning.data.json_rows import Rows
from sdft_lightning.data.rows import Columns, compose, parse_rows, wanted_columns
from sdft_lightning.data.sources import HubSource, read_rows
from sdft_lightning.errors import UserError
from sdft_lightning.types import RowNeeds

CHOICES = {"text": ["iron", "gold"], "label": ["A", "B"]}
MAP = Columns(
    prompt="$question\n$choices", demonstration="The correct answer is $key.", reference="key"
)


def rows_of(*rows: dict[str, Any]) -> Rows:
    names = {name for row in rows for name in row}
    places = [f"row {place}" for place in range(1, len(rows) + 1)]
    return Rows("f", list(rows), places, names)


@pytest.mark.parametrize("choices", [CHOICES, ["iron", "gold"]])
def test_a_prompt_is_made_of_question_and_lettered_choices(choices: Any) -> None:
    found = rows_of({"question": "Which rusts?", "choices": choices, "key": "A"})
    (row,) = parse_rows(compose(found, MAP), MAP, RowNeeds())
    assert row.prompt == [{"role": "user", "content": "Which rusts?\nA. iron\nB. gold"}]
    assert row.demonstration == [{"role": "assistant", "content": "The correct answer is A."}]
    assert row.reference == "A"


def test_columns_inside_texts_are_wanted() -> None:
    assert {"question", "choices", "key"} <= set(wanted_columns(MAP))
    assert set(wanted_columns(Columns())) == {"prompt", "demonstration"}


def test_a_missing_column_of_a_text_is_told_with_those_there_are() -> None:
    found = rows_of({"question": "Q?", "key": "A"})
    with pytest.raises(UserError, match=r"no column '\$question\\n\$choices'.*are .*key, question"):
        parse_rows(compose(found, MAP), MAP, RowNeeds())


def test_a_column_whose_own_name_has_a_dollar_sign_is_read_as_it_is() -> None:
    columns = Columns(prompt="in $", demonstration="$out")
    found = rows_of({"in $": "Q?", "$out": "A."})
    (row,) = parse_rows(compose(found, columns), columns, RowNeeds())
    assert row.demonstration[0]["content"] == "A."


@pytest.mark.parametrize("value", [None, True, [], ["a", 1], {"text": ["a"], "label": []}, b"x"])
def test_a_value_that_is_no_text_is_named_with_its_row(value: Any) -> None:
    found = rows_of({"question": "Q?", "choices": value, "key": "A"})
    with pytest.raises(UserError, match=r"f, row 1: column 'choices' must be a text"):
        compose(found, MAP)


def test_a_lone_dollar_sign_is_refused() -> None:
    with pytest.raises(UserError, match=r"lone \$"):
        compose(rows_of({"question": "Q?"}), Columns(prompt="$question for 5 $"))


def science() -> datasets.Dataset:
    rows = [
        {
            "question": f"Q{i}",
            "domain": ["Chemistry", "Biology"][i % 2],
            "details": {"level": ["L1", "L3"][i // 2 % 2]},
        }
        for i in range(80)
    ]
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: science())


WHERE = {"domain": "Chemistry", "details.level": "L3"}


@pytest.mark.usefixtures("hub")
def test_only_rows_with_the_values_are_taken() -> None:
    source = HubSource(repo="a/b", split="test", where=WHERE)
    found = read_rows(source, "data.train", ["question"])
    assert [row["question"] for row in found.rows] == [f"Q{i}" for i in range(2, 80, 4)]


@pytest.mark.usefixtures("hub")
def test_parts_of_a_split_are_apart_together_whole_and_always_the_same() -> None:
    parts = [[0, 75], [75, 80], [80, 100]]
    sources = [HubSource(repo="a/b", split="test", where=WHERE, percent=part) for part in parts]
    read = [[row["question"] for row in read_rows(each, "data.x").rows] for each in sources]
    assert [len(part) for part in read] == [15, 1, 4]
    together = [name for part in read for name in part]
    assert sorted(together) == sorted(f"Q{i}" for i in range(2, 80, 4))
    assert together != [f"Q{i}" for i in range(2, 80, 4)]
    assert [row["question"] for row in read_rows(sources[1], "data.x").rows] == read[1]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"where": {"level": "L3"}}, r"data\.train\.where: .*no column 'level'.*domain, details"),
        ({"where": {"details.level": "L9"}}, r"no row of a/b.* has \{'details.level': 'L9'\}"),
        ({"percent": [75, 0]}, r"data\.train\.percent: got \[75, 0\]"),
        ({"percent": [0, 101]}, r"data\.train\.percent"),
        ({"percent": [50]}, r"data\.train\.percent"),
        ({"percent": [0, 0.1]}, "has no rows"),
    ],
)
def test_a_part_that_cannot_be_is_refused(options: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_rows(HubSource(repo="a/b", split="test", **options), "data.train")
