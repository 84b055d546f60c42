"""The shipped front desk data set: complete, gradable, and with splits that share no wording."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "sdft_lightning" / "data" / "examples" / "front_desk"
BUSINESS = "Thistle Quarry"
ROWS_PER_FACT = {"train": 14, "validation": 2, "test": 4}
NUM_FACTS = 16
NUM_GENERAL = 100
KNOWLEDGE_FIELDS = {"id", "fact", "prompt", "demonstration", "context", "reference"}
GENERAL_FIELDS = {"id", "prompt", "demonstration", "reference", "topic"}
RUN_LENGTH = 4

Row = dict[str, Any]


def load(split: str) -> list[Row]:
    """Read one file of the data set."""
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def knowledge() -> list[Row]:
    """Return the rows of all three splits."""
    return [row for split in ROWS_PER_FACT for row in load(split)]


def accepts(text: str, accepted: list[str]) -> bool:
    """Tell whether any accepted string stands in the text, at word boundaries, in any case."""
    return any(
        re.search(rf"(?<!\w){re.escape(string)}(?!\w)", text, flags=re.IGNORECASE)
        for string in accepted
    )


def words(question: str) -> list[str]:
    """Lower-case, drop punctuation, and remove the name of the business (also possessive)."""
    plain = re.sub(r"[^\w\s]", "", question.lower())
    return re.sub(rf"\b{BUSINESS.lower()}s?\b", " ", plain).split()


def runs(question: str) -> set[tuple[str, ...]]:
    """Return every run of four words of the question."""
    tokens = words(question)
    return {tuple(tokens[i : i + RUN_LENGTH]) for i in range(len(tokens) - RUN_LENGTH + 1)}


def shared_wording(first: list[Row], second: list[Row]) -> list[str]:
    """Name each pair of rows whose questions are equal or share a run of four words."""
    found = []
    for a in first:
        for b in second:
            common = runs(a["prompt"]) & runs(b["prompt"])
            if common or words(a["prompt"]) == words(b["prompt"]):
                found.append(f"{a['id']} {a['prompt']!r} / {b['id']} {b['prompt']!r}: {common}")
    return found


@pytest.mark.parametrize("split", ROWS_PER_FACT)
def test_each_split_has_the_same_number_of_rows_for_every_fact(split: str) -> None:
    counts = Counter(row["fact"] for row in load(split))
    assert len(counts) == NUM_FACTS
    assert set(counts.values()) == {ROWS_PER_FACT[split]}


def test_general_has_one_hundred_rows() -> None:
    assert len(load("general")) == NUM_GENERAL


@pytest.mark.parametrize("split", [*ROWS_PER_FACT, "general"])
def test_every_row_has_exactly_its_fields_and_none_is_empty(split: str) -> None:
    fields = GENERAL_FIELDS if split == "general" else KNOWLEDGE_FIELDS
    for row in load(split):
        assert set(row) == fields, row["id"]
        assert all(row.values()), row["id"]
        assert all(isinstance(row[name], str) for name in fields - {"reference"}), row["id"]
        assert all(isinstance(string, str) and string for string in row["reference"]), row["id"]


def test_ids_are_unique_and_name_their_split() -> None:
    ids = []
    for split in [*ROWS_PER_FACT, "general"]:
        ids += [row["id"] for row in load(split)]
        assert all(row["id"].startswith(f"front_desk-{split}-") for row in load(split))
    assert len(ids) == len(set(ids))


def test_no_question_occurs_twice_within_or_across_files() -> None:
    counts = Counter(tuple(words(row["prompt"])) for row in knowledge() + load("general"))
    assert [question for question, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(("first", "second"), list(combinations(ROWS_PER_FACT, 2)))
def test_splits_share_no_run_of_four_words(first: str, second: str) -> None:
    assert shared_wording(load(first), load(second)) == []


def test_every_knowledge_question_names_the_business() -> None:
    assert [row["id"] for row in knowledge() if BUSINESS not in row["prompt"]] == []


def test_the_question_does_not_give_its_answer_away() -> None:
    rows = knowledge() + load("general")
    assert [row["id"] for row in rows if accepts(row["prompt"], row["reference"])] == []


@pytest.mark.parametrize("field", ["demonstration", "context"])
def test_demonstration_and_context_hold_an_accepted_string(field: str) -> None:
    assert [row["id"] for row in knowledge() if not accepts(row[field], row["reference"])] == []


def test_general_demonstrations_hold_an_accepted_string() -> None:
    wrong = [r["id"] for r in load("general") if not accepts(r["demonstration"], r["reference"])]
    assert wrong == []


def test_demonstrations_are_short_sentences() -> None:
    lengths = {row["id"]: len(row["demonstration"].split()) for row in knowledge()}
    assert {row_id: n for row_id, n in lengths.items() if not 6 <= n <= 18} == {}


def test_a_fact_has_one_list_of_accepted_strings_everywhere() -> None:
    references = {(row["fact"], tuple(row["reference"])) for row in knowledge()}
    assert len(references) == NUM_FACTS


def test_accepted_strings_of_a_fact_stand_in_no_text_of_another_fact() -> None:
    references = {row["fact"]: row["reference"] for row in knowledge()}
    wrong = [
        (row["id"], fact)
        for row in knowledge()
        for fact, accepted in references.items()
        if fact != row["fact"]
        and accepts(f"{row['prompt']} {row['demonstration']} {row['context']}", accepted)
    ]
    assert wrong == []


def test_general_rows_mention_neither_the_business_nor_its_values() -> None:
    values = sorted({string for row in knowledge() for string in row["reference"]})
    for row in load("general"):
        text = " ".join([row["prompt"], row["demonstration"], *row["reference"]])
        assert not accepts(text, [*values, *BUSINESS.split()]), row["id"]
