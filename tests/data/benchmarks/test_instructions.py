"""Checkers of instructions: each with answers that pass and that fail, and all shipped rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.data.benchmarks.instructions import (
    CHECKS,
    LANGUAGES,
    checked,
    graded,
    loose_score,
    share_of_instructions,
    strict_score,
)
from sdft_lightning.data.sources import example_path
from sdft_lightning.errors import UserError

ROWS = [
    json.loads(line)
    for line in example_path("example:kept/instructions.jsonl", "test")
    .read_text("utf-8")
    .splitlines()
]
ANSWERS: dict[str, str] = json.loads(
    (Path(__file__).parent / "instruction_answers.json").read_text(encoding="utf-8")
)
GENERIC = [
    "Sure! I would be happy to help you with that.",
    "I am an assistant, and I will do my best to help you. Please tell me more about what you "
    "need, so that I can give you a good answer.",
]
TABLE = "| a | b |\n|---|:-:|\n| 1 | 2 |\n| 3 | 4 |"

# kind, options, answers that follow the instruction, answers that do not
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "words",
        {"at_least": 3, "at_most": 4},
        ["one two three", "it's a well-known 3.5"],
        ["one two", "a b c d e"],
    ),
    ("characters", {"at_most": 5}, ["abcde", " abcde\n"], ["abcdef"]),
    (
        "sentences",
        {"at_least": 2, "at_most": 2},
        ["One. Two!", "Dr. No came at 3.30 p.m. and left. Why?", "1. Stir\n2. Drink"],
        ["One.", "One. Two. Three."],
    ),
    (
        "sentences_start",
        {"text": "I"},
        ["I am. I was.", "“I am.” I was."],
        ["I am. It was.", "I am."],
    ),
    (
        "paragraphs",
        {"at_least": 2, "at_most": 2},
        ["a\nb\n\nc", "a\n  \nc\n"],
        ["a\nb", "a\n\nb\n\nc"],
    ),
    (
        "paragraphs",
        {"at_least": 2, "at_most": 2, "separator": "***"},
        ["a\n\n***\n\nb", "a\n***\nb\n\nc"],
        ["a\n\nb", "a *** b", "a\n***\n", "a\n***\nb\n***\nc"],
    ),
    ("lines", {"at_least": 2, "at_most": 2}, ["a\n\nb"], ["a", "a\nb\nc"]),
    ("lines_start", {"text": "M"}, ["Mia\nMax", "1. Mia\n2. Max"], ["Mia\nTom", "Mia"]),
    (
        "bullets",
        {"at_least": 2, "at_most": 2},
        ["So:\n- a\n- b", "* a\n  * b", "• a\n• b"],
        ["- a", "- a\n- b\n- c", "1. a\n2. b", "-a\n-b"],
    ),
    (
        "steps",
        {"at_least": 2, "at_most": 2},
        ["1. a\n2. b", "First:\n1) a\n\n2) b", "Step 1: a\nStep 2: b"],
        ["1. a", "1. a\n3. b", "2. a\n1. b", "- a\n- b", "1. a\n2. b\n3. c"],
    ),
    (
        "alphabetical",
        {"at_least": 3},
        ["Ash\nbeech\nOak", "1. Ash\n2. Beech\n3. Oak"],
        ["Oak\nAsh\nBeech", "a\nb"],
    ),
    (
        "sections",
        {"text": "Part", "at_least": 2, "at_most": 2},
        ["Part 1\na\nPart 2\nb", "## Part 1: a\n\n**part 2** b"],
        ["Part 1\na", "Part 2\na\nPart 1\nb", "In part 1 we\nParty 2"],
    ),
    ("lowercase", {}, ["a small ß, 3 times"], ["A b", "123"]),
    ("uppercase", {}, ["STOP! 3 TIMES"], ["STOP it", "..."]),
    (
        "capital_words",
        {"at_least": 2, "at_most": 2},
        ["the NEW and the OLD one"],
        ["a NEW I", "AA BB CC"],
    ),
    (
        "include",
        {"words": ["sun", "ice cream"]},
        ["Ice cream in the Sun."],
        ["sunny ice cream", "sun"],
    ),
    ("avoid", {"words": ["lie", "war"]}, ["a warm life", "believe"], ["It is a lie.", "WAR"]),
    ("without", {"words": [",", "!"]}, ["no commas."], ["a, b", "oh!"]),
    (
        "frequency",
        {"text": "egg", "at_least": 2, "at_most": 2},
        ["Egg on egg", "egg, egg, eggs"],
        ["egg", "egg egg egg"],
    ),
    ("letter", {"text": "z", "at_least": 3}, ["Zigzag: z"], ["zoo zoo"]),
    ("letter", {"text": "q", "at_most": 0}, ["none"], ["Quiet"]),
    (
        "starts",
        {"text": "To be honest"},
        ["To be honest, no.", " to be\nhonest"],
        ["Honestly", "To be honestly"],
    ),
    ("starts", {"text": "Why not?"}, ["Why not? Because."], ["Why? Not"]),
    (
        "ends",
        {"text": "the end"},
        ["This is the end.", "the END", 'It said "the end"'],
        ["the end is near", "lathe end"],
    ),
    ("ends", {"text": "Have fun!"}, ["Go. Have fun!"], ["Have fun", "Have fun! Bye"]),
    ("ends", {"text": "?"}, ["Is it?"], ["It is."]),
    ("one_of", {"words": ["Yes", "No"]}, ["yes", "No."], ["Yes, it is", "Maybe"]),
    ("quoted", {}, ['"Well."', "“Well.”"], ['He said "well"', '"Well.', '""']),
    ("title", {}, ["<<Sea>>\nIt", "a <<my poem>>"], ["<Sea>", "<<>>", "<<a\nb>>"]),
    (
        "postscript",
        {},
        ["Hi\n\nP.S. One more", "Hi\n**P.S.** x"],
        ["P.S. first", "Hi P.S. x", "Hi\nP.S."],
    ),
    ("postscript", {"text": "P.P.S."}, ["Hi\nP.P.S. x"], ["Hi\nP.S. x"]),
    (
        "placeholders",
        {"at_least": 2, "at_most": 2},
        ["[name] at [the date]"],
        ["[name]", "[] []", "[a] [b] [c]"],
    ),
    (
        "bold",
        {"at_least": 2, "at_most": 2},
        ["*a* and *b c*", "**a** and **b**"],
        ["*a*", "* a\n* b", "**a** *b* *c*"],
    ),
    (
        "json_value",
        {"words": ["a", "b"]},
        ['{"a": 1, "b": null}', '```json\n{"a": 1, "b": 2, "c": 3}\n```'],
        ['{"a": 1}', '["a", "b"]', "{a: 1, b: 2}", 'Here: {"a": 1, "b": 2}'],
    ),
    (
        "json_value",
        {"at_least": 2, "at_most": 2},
        ["[1, 2]"],
        ["[1]", "[1, 2, 3]", '{"a": 1}', "[" * 9999],
    ),
    (
        "csv_rows",
        {"columns": 2, "at_least": 2, "at_most": 2},
        ["a,b\n1,2", 'a,b\n"x, y",2', "```csv\na,b\n1,2\n```"],
        ["a,b", "a,b\n1", "a,b\n1,2\n3,4", "Here it is:\na,b\n1,2"],
    ),
    (
        "table",
        {"columns": 2, "at_least": 2, "at_most": 2},
        [TABLE, f"Look:\n\n{TABLE}"],
        ["| a | b |\n| 1 | 2 |", TABLE + "\n| 5 | 6 |", TABLE.replace("2", "2 | 0"), "a"],
    ),
    (
        "language",
        {"text": "German"},
        ["Das ist nicht mein Haus."],
        [
            "This is not my house.",
            "Haus",
            "The words der, die and das are the same as the in English, and that is all.",
            "lorem ipsum dolor " * 6 + "der die",
        ],
    ),
]
SENTENCES = {
    "English": "The children went to the market and bought a basket of apples for their mother.",
    "German": "Die Kinder gingen auf den Markt und kauften für ihre Mutter einen Korb mit Äpfeln.",
    "French": "Les enfants sont allés au marché et ont acheté un panier de pommes pour leur mère.",
    "Spanish": "Los niños fueron al mercado y compraron una cesta de manzanas para su madre.",
    "Italian": "I bambini sono andati al mercato e hanno comprato un cesto di mele per la madre.",
    "Portuguese": "As crianças foram ao mercado e compraram um cesto de maçãs para a sua mãe.",
    "Russian": "Дети пошли на рынок и купили маме корзину яблок.",
    "Greek": "Τα παιδιά πήγαν στην αγορά και αγόρασαν μήλα για τη μητέρα τους.",  # noqa: RUF001
    "Japanese": "子どもたちは市場へ行って、お母さんにりんごを買いました。",
}


@pytest.mark.parametrize(
    ("kind", "options", "good", "bad"),
    CASES,
    ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)],
)
def test_a_checker_takes_what_follows_and_refuses_what_does_not(
    kind: str, options: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    for answer in good:
        assert CHECKS[kind](answer, **options), answer
    for answer in bad:
        assert not CHECKS[kind](answer, **options), answer


def test_every_checker_has_a_case_and_stands_in_a_shipped_row() -> None:
    assert {kind for kind, *_ in CASES} == set(CHECKS)
    assert {check["kind"] for row in ROWS for check in row["checks"]} == set(CHECKS)


@pytest.mark.parametrize("written", LANGUAGES)
def test_a_sentence_is_in_its_own_language_and_in_no_other(written: str) -> None:
    found = [name for name in LANGUAGES if CHECKS["language"](SENTENCES[written], text=name)]
    assert found == [written]


def test_at_least_120_rows_are_unlike_and_have_one_to_three_known_checks() -> None:
    assert len(ROWS) >= 120
    assert len({row["prompt"].lower() for row in ROWS}) == len(ROWS)
    assert all(1 <= len(row["checks"]) <= 3 for row in ROWS)
    for number, row in enumerate(ROWS, start=1):
        assert row["id"] == f"kept-instructions-{number:03d}"
    assert checked(ROWS) is ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_an_empty_and_a_generic_answer_follow_no_row(row: dict[str, Any]) -> None:
    for empty in ("", " \n", "**"):
        assert not all(loose_score(empty, row["checks"])), repr(empty)
    assert not any(strict_score("", row["checks"]))
    for answer in GENERIC:
        assert not all(loose_score(answer, row["checks"])), answer


def test_answers_by_hand_follow_every_kind_of_instruction() -> None:
    by_id = {row["id"]: row for row in ROWS}
    assert len(ANSWERS) >= 30
    assert {c["kind"] for name in ANSWERS for c in by_id[name]["checks"]} == set(CHECKS)
    for name, answer in ANSWERS.items():
        checks = by_id[name]["checks"]
        assert strict_score(answer, checks) == [True] * len(checks), name
        assert len(answer.split()) <= 100, f"{name}: it must fit into max_gen_toks"


def test_answers_by_hand_follow_few_rows_but_their_own() -> None:
    """Else the checks would ask for nothing."""
    pairs = [
        all(strict_score(answer, row["checks"]))
        for name, answer in ANSWERS.items()
        for row in ROWS
        if row["id"] != name
    ]
    assert sum(pairs) / len(pairs) < 0.05


def test_loose_leaves_out_an_opening_line_a_closing_line_and_asterisks() -> None:
    checks = [{"kind": "starts", "text": "Slowly"}, {"kind": "ends", "text": "it came"}]
    for answer in (
        "Sure, here it is:\nSlowly it came",
        "Slowly it came\n\nI hope that this helps!",
        "Here:\n**Slowly it came**\nAnything else?",
    ):
        assert strict_score(answer, checks) != [True, True]
        assert loose_score(answer, checks) == [True, True]
    assert loose_score("Quickly it went", checks) == [False, False]
    one = [{"kind": "lines", "at_most": 1}]
    assert loose_score("Here:\nSlowly it came\nAnything else?", one) == [True]


def test_graded_counts_prompts_instructions_words_and_repeated_pairs() -> None:
    # An Arrow table gives each check the options of all others, as None.
    doc = {
        "checks": [
            {"kind": "words", "at_least": 6, "at_most": None, "text": None},
            {"kind": "frequency", "at_least": 3, "at_most": 3, "text": "ding"},
            {"kind": "lowercase", "at_least": None, "at_most": None, "text": None},
        ]
    }
    found = graded(doc, ["Ding dong ding dong ding dong"])
    assert found == {
        "prompt_level_strict_acc": 0.0,
        "inst_level_strict_acc": [True, True, False],
        "prompt_level_loose_acc": 0.0,
        "inst_level_loose_acc": [True, True, False],
        "answer_words": 6,
        "answer_distinct_2": 2 / 5,
    }
    assert graded(doc, ["Listen:\nding dong ding dong ding dong"])["prompt_level_loose_acc"] == 1.0
    assert graded(doc, [""])["answer_distinct_2"] == 1.0
    assert graded(doc, [""])["inst_level_loose_acc"] == [False] * 3


def test_instructions_weigh_alike_whatever_their_prompts_hold() -> None:
    assert share_of_instructions([[True], [True, False, False]]) == 0.5


@pytest.mark.parametrize(
    ("checks", "told"),
    [
        ([], "row 2 has none"),
        (None, "row 2 has none"),
        ([{"kind": "rhyme"}], "row 2 has the kind 'rhyme'. Allowed are words, characters"),
        ([{"at_least": 2}], "row 2 has the kind None"),
        ([{"kind": "lowercase", "at_least": 1}], "lowercase has the options .*Allowed are none"),
        ([{"kind": "starts"}], "needed text"),
        ([{"kind": "language", "text": "Klingon"}], "'Klingon'. Allowed are English"),
    ],
)
def test_rows_of_no_known_check_are_refused(checks: Any, told: str) -> None:
    rows = [{"checks": [{"kind": "lowercase", "text": None}]}, {"checks": checks}]
    with pytest.raises(UserError, match=told):
        checked(rows)
