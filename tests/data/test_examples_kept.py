"""The shipped sets that say what to keep, and measure it: complete, diverse, and kept apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.data.rows import Columns, parse_rows
from sdft_lightning.data.sources import read_rows
from sdft_lightning.graders import get_grader
from sdft_lightning.types import RowNeeds

EXAMPLES = Path(__file__).resolve().parents[2] / "sdft_lightning" / "data" / "examples"
TASKS = ("front_desk", "ferry", "museum")
BUSINESSES = ("Thistle Quarry", "Brindle Ferry", "Orrin Museum")
RUN_LENGTH = 8

Row = dict[str, Any]
Run = tuple[str, ...]


def load(name: str) -> list[Row]:
    """Read a file of the examples, by its path without the ending."""
    lines = (EXAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(text: str) -> Run:
    return tuple(re.findall(r"\w+", text.lower()))


def runs(text: str) -> set[Run]:
    """Every run of eight words."""
    found = words(text)
    return {found[i : i + RUN_LENGTH] for i in range(len(found) - RUN_LENGTH + 1)}


def texts(value: Any) -> Iterator[str]:
    """All texts of a row, however deep they lie."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts(each)


def task_rows() -> list[Row]:
    """The rows of the sets that teach something new."""
    return [
        row
        for name in TASKS
        for split in ("train", "validation", "test")
        for row in load(f"{name}/{split}")
    ]


def measured() -> list[str]:
    """What the project's own sets measure with."""
    rows = [*load("front_desk/general"), *load("kept/questions"), *load("kept/instructions")]
    return [row["prompt"] for row in [*task_rows(), *rows]] + [
        row["text"] for row in load("kept/text")
    ]


def retained() -> list[str]:
    return [row["prompt"] for row in load("retain/prompts")]


def test_at_least_320_prompts_of_many_kinds_are_retained() -> None:
    rows = load("retain/prompts")
    kinds = Counter(row["kind"] for row in rows)
    assert len(rows) >= 320
    assert len(kinds) >= 20
    assert min(kinds.values()) >= 12
    for number, row in enumerate(rows, start=1):
        assert row["id"] == f"retain-{number:03d}"
        assert set(row) == {"id", "kind", "prompt"}
        assert row["prompt"] == row["prompt"].strip() != ""


def test_retained_prompts_differ_and_share_no_run_of_eight_words() -> None:
    assert len({words(prompt) for prompt in retained()}) == len(retained())
    counts = Counter(run for prompt in retained() for run in runs(prompt))
    assert [run for run, count in counts.items() if count > 1] == []


def test_retained_prompts_stand_in_no_set_that_measures() -> None:
    forbidden = {words(text) for text in measured()}
    forbidden_runs = {run for text in measured() for run in runs(text)}
    shared = [p for p in retained() if words(p) in forbidden or runs(p) & forbidden_runs]
    assert shared == []


def test_nothing_of_ours_stands_in_benchmarks_of_others(shared_data: Path) -> None:
    ours = {run for text in [*retained(), *measured()] for run in runs(text)}
    prompts = {words(text) for text in retained()}
    found = []
    for file in sorted(shared_data.rglob("*.jsonl")):
        for line in file.read_bytes().splitlines():  # a text may hold line ends of Unicode
            for text in texts(json.loads(line)):
                if words(text) in prompts or runs(text) & ours:
                    found.append((file.name, text[:80]))
    assert found == []


def test_the_readme_counts_its_rows() -> None:
    text = (EXAMPLES / "retain" / "README.md").read_text(encoding="utf-8")
    kinds = Counter(row["kind"] for row in load("retain/prompts"))
    shown: dict[str, int] = {}
    for names, count in re.findall(r"\| ([a-z_]+(?:, [a-z_]+)*) \| (\d+)(?: each)? (?=\|)", text):
        shown |= {name: int(count) for name in names.split(", ")}
    assert shown == dict(kinds)
    assert f"| `prompts.jsonl` | {sum(kinds.values())} |" in text


def test_retained_prompts_are_read_as_rows_without_demonstrations() -> None:
    found = read_rows("example:retain/prompts.jsonl", "data.retain")
    rows = parse_rows(found, Columns(id="id"), RowNeeds(demonstration=False))
    assert len(rows) == len(retained())
    assert rows[0].prompt == [{"role": "user", "content": retained()[0]}]
    assert rows[0].id == "retain-001"


@pytest.mark.parametrize("name", ["retain/prompts", "kept/questions", "kept/instructions"])
def test_no_prompt_names_a_business_of_the_tasks(name: str) -> None:
    holds = get_grader("contains")
    assert [row["id"] for row in load(name) if holds(row["prompt"], list(BUSINESSES))] == []


def test_three_hundred_questions_more_have_the_fields_of_the_general_ones() -> None:
    rows, general = load("kept/questions"), load("front_desk/general")
    assert len(rows) >= 300
    assert len({row["topic"] for row in rows}) >= 20
    for number, row in enumerate(rows, start=1):
        assert list(row) == list(general[0])
        assert row["id"] == f"kept-questions-{number:03d}"
        assert all(row.values()), row["id"]


def test_no_question_occurs_twice_or_among_the_general_ones() -> None:
    counts = Counter(
        words(r["prompt"]) for r in [*load("kept/questions"), *load("front_desk/general")]
    )
    assert [question for question, count in counts.items() if count > 1] == []


def test_a_question_does_not_hold_its_answer_and_its_demonstration_does() -> None:
    holds = get_grader("contains")
    for row in load("kept/questions"):
        assert not holds(row["prompt"], row["reference"]), row["id"]
        assert holds(row["demonstration"], row["reference"]), row["id"]


def test_questions_hold_no_answer_of_the_tasks() -> None:
    values = sorted({text for row in task_rows() for text in row["reference"]})
    holds = get_grader("contains")
    for row in load("kept/questions"):
        text = " ".join([row["prompt"], row["demonstration"], *row["reference"]])
        assert not holds(text, values), row["id"]


def test_the_text_has_five_thousand_words_of_different_kinds() -> None:
    rows = load("kept/text")
    assert sum(len(row["text"].split()) for row in rows) >= 5000
    assert len({row["kind"] for row in rows}) >= 12
    for number, row in enumerate(rows, start=1):
        assert row["id"] == f"kept-text-{number:02d}"
        assert len(row["text"].split()) >= 250, row["id"]


def test_readme_and_page_count_what_is_there() -> None:
    readme = (EXAMPLES / "kept" / "README.md").read_text(encoding="utf-8")
    page = (EXAMPLES.parents[2] / "docs" / "kept_abilities.md").read_text(encoding="utf-8")
    for name in ("instructions", "questions", "text"):
        assert f"| `{name}.jsonl` | {len(load(f'kept/{name}'))} |" in readme
    words_of_text = sum(len(row["text"].split()) for row in load("kept/text"))
    assert f"{words_of_text:,} words" in readme
    checks = sum(len(row["checks"]) for row in load("kept/instructions"))
    prompts = len(load("kept/instructions"))
    assert f"| `kept_instructions` | {prompts} prompts, {checks} instructions |" in page
    assert f"| `kept_questions` | {len(load('kept/questions'))} |" in page
    assert f"| `kept_text` | {len(load('kept/text'))} texts, {words_of_text:,} words |" in page
    assert f"holds {len(retained())} prompts" in page
