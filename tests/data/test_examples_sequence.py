"""The shipped sets that follow front_desk in a sequence: complete, gradable, and kept apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.graders import get_grader

EXAMPLES = Path(__file__).resolve().parents[2] / "sdft_lightning" / "data" / "examples"
SUBJECTS = {"ferry": "Brindle Ferry", "museum": "Orrin Museum"}
ROWS_PER_FACT = {"train": 8, "validation": 2, "test": 4}
FIELDS = {"id", "fact", "prompt", "demonstration", "context", "reference"}
RUN_LENGTH = 4

Row = dict[str, Any]
each_set = pytest.mark.parametrize("name", SUBJECTS)


def load(name: str, split: str) -> list[Row]:
    lines = (EXAMPLES / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def all_rows(name: str) -> list[Row]:
    return [row for split in ROWS_PER_FACT for row in load(name, split)]


def holds(text: str, accepted: list[str]) -> bool:
    return get_grader("contains")(text, accepted) == 1.0


def words(question: str, subject: str) -> list[str]:
    plain = re.sub(r"[^\w\s]", "", question.lower())
    return re.sub(rf"\b{subject.lower()}s?\b", " ", plain).split()


def runs(question: str, subject: str) -> set[tuple[str, ...]]:
    found = words(question, subject)
    return {tuple(found[i : i + RUN_LENGTH]) for i in range(len(found) - RUN_LENGTH + 1)}


@each_set
@pytest.mark.parametrize("split", ROWS_PER_FACT)
def test_eight_facts_have_as_many_rows_each_with_all_fields(name: str, split: str) -> None:
    rows = load(name, split)
    counts = Counter(row["fact"] for row in rows)
    assert len(counts) == 8
    assert set(counts.values()) == {ROWS_PER_FACT[split]}
    for number, row in enumerate(rows, start=1):
        assert row["id"] == f"{name}-{split}-{number:03d}"
        assert set(row) == FIELDS
        assert all(row.values()), row["id"]


@each_set
@pytest.mark.parametrize(("first", "second"), list(combinations(ROWS_PER_FACT, 2)))
def test_splits_share_no_run_of_four_words(name: str, first: str, second: str) -> None:
    subject = SUBJECTS[name]
    shared = [
        (a["prompt"], b["prompt"])
        for a in load(name, first)
        for b in load(name, second)
        if runs(a["prompt"], subject) & runs(b["prompt"], subject)
        or words(a["prompt"], subject) == words(b["prompt"], subject)
    ]
    assert shared == []


@each_set
def test_no_question_occurs_twice(name: str) -> None:
    counts = Counter(tuple(words(row["prompt"], SUBJECTS[name])) for row in all_rows(name))
    assert [question for question, count in counts.items() if count > 1] == []


@each_set
def test_question_and_demonstration_name_the_subject_and_only_the_latter_the_answer(
    name: str,
) -> None:
    for row in all_rows(name):
        assert SUBJECTS[name] in row["prompt"], row["id"]
        assert SUBJECTS[name] in row["demonstration"], row["id"]
        assert holds(row["demonstration"], row["reference"]), row["id"]
        assert holds(row["context"], row["reference"]), row["id"]
        assert not holds(row["prompt"], row["reference"]), row["id"]


@each_set
def test_answers_of_a_fact_stand_in_no_text_of_another_fact_set_or_general_question(
    name: str,
) -> None:
    references = {row["fact"]: row["reference"] for row in all_rows(name)}
    others = [
        row for other in ("front_desk", *SUBJECTS) if other != name for row in all_rows(other)
    ]
    for row in [*all_rows(name), *others, *load("front_desk", "general")]:
        text = " ".join([row["prompt"], row["demonstration"], row.get("context", "")])
        for fact, reference in references.items():
            own = row["id"].startswith(name) and row.get("fact") == fact
            assert own or not holds(text, reference), (row["id"], fact)
