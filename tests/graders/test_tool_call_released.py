"""Parity with the paper's tool-use evaluation, its weaknesses included."""

import json
import os
import time
from pathlib import Path

import pytest

from sdft_lightning.graders import get_grader, gold_self_test
from sdft_lightning.graders.tool_call import render_calls

DATA = Path(os.environ.get("SDFT_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared/data"))
GOLD = [{"Action": "getFacts", "Action_Input": '{"limit": 5}'}]
TWO = [
    {"Action": "find", "Action_Input": '{"name": "x"}'},
    {"Action": "drop", "Action_Input": '{"id": 1}'},
]
grade = get_grader("tool_call_released")


@pytest.mark.parametrize(
    "text",
    [
        'Action: getFacts\nAction Input: {"limit": 5}',
        'I need facts.\nAction: getFacts\nAction Input: {"limit": 5}\nDone.',
        'Action:\n\n getFacts\nAction Input:\n{\n  "limit": 5\n}',
        'Action: getFacts Action Input: {"limit": 5}',
        'Action: getFacts\nAction Input: {"limit": 5.0}',
        'Action: getFacts-now\nAction Input: {"limit": 5}',  # the name ends at the hyphen
        'Action Input: {"limit": 5}\nAction: getFacts',
        'Action: getFacts\nAction Input: {"limit": 5}\nAction Input: {"broken"}',
    ],
)
def test_name_and_arguments_that_the_release_accepts(text: str) -> None:
    assert grade(text, GOLD) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "getFacts",
        "Action: getFacts",
        'Action: getfacts\nAction Input: {"limit": 5}',
        'action: getFacts\naction input: {"limit": 5}',
        'Action: getFacts\nAction Input: {"limit": "5"}',
        'Action: getFacts\nAction Input: {"limit": 5, "page": 1}',
        "Action: getFacts\nAction Input: {'limit': 5}",
        'Action: getFacts\nAction Input: {"limit": 5',
        'Action: getFacts\nAction_Input: {"limit": 5}',
        '**Action:** getFacts\n**Action Input:** {"limit": 5}',
        'Action: `getFacts`\nAction Input: {"limit": 5}',
        'Action: getFacts\nAction Input: ```json\n{"limit": 5}\n```',
        'Action:\nAction Input: {"limit": 5}',  # read as a call of "Action"
        'Action: getFacts\nAction Input: {"limit": 5}\nAction: getFacts',
    ],
)
def test_name_and_arguments_that_the_release_rejects(text: str) -> None:
    assert grade(text, GOLD) == 0.0


def test_the_order_of_several_calls_does_not_count() -> None:
    assert grade(render_calls(TWO), TWO) == 1.0
    assert grade(render_calls(TWO[::-1]), TWO) == 1.0
    assert grade(render_calls(TWO[:1]), TWO) == 0.0


def test_arguments_given_to_the_wrong_call_are_not_noticed() -> None:
    text = 'Action: find\nAction Input: {"id": 1}\nAction: drop\nAction Input: {"name": "x"}'
    assert grade(text, TWO) == 1.0


def test_a_later_call_hides_the_same_argument_of_an_earlier_one() -> None:
    gold = [{"Action": "get", "Action_Input": f'{{"id": {i}}}'} for i in (1, 2)]
    text = 'Action: get\nAction Input: {"id": 9}\nAction: get\nAction Input: {"id": 2}'
    assert grade(text, gold) == 1.0


def test_a_nested_argument_is_lost_so_that_even_gold_fails() -> None:
    gold = [{"Action": "save", "Action_Input": '{"user": {"id": 1}}'}]
    assert grade(render_calls(gold), gold) == 0.0


def test_malformed_golden_arguments_count_as_none() -> None:
    gold = [{"Action": "save", "Action_Input": '{"user": '}]
    assert grade("Action: save", gold) == 1.0
    assert grade('Action: save\nAction Input: {"user": 1}', gold) == 0.0


def test_brackets_thousands_deep_score_zero_and_do_not_stop_the_run() -> None:
    deep = '{"limit": ' + "[" * 200_000 + "}"
    assert grade(f"Action: getFacts\nAction Input: {deep}", GOLD) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "Action:" + " " * 20_000,
        "Action:" * 2_800,
        "Action Input: " + "\n" * 20_000,
        "Action Input: {" * 1_300,
        "Action Input: {" + "[" * 20_000,
        'Action Input: {"a": ' + "9" * 20_000 + "}",
    ],
)
def test_a_completion_that_repeats_itself_is_graded_within_a_second(text: str) -> None:
    start = time.process_time()
    assert grade(text, GOLD) == 0.0
    assert time.process_time() - start < 1


def test_a_name_may_be_unicode() -> None:
    gold = [{"Action": "caf\u00e9", "Action_Input": '{"q": "\u6771\u4eac"}'}]
    assert grade(render_calls(gold), gold) == 1.0


@pytest.mark.parametrize(
    "reference",
    [
        None,
        [],
        "getFacts",
        {"Action": "getFacts", "Action_Input": "{}"},
        ["getFacts"],
        [{"Action": "getFacts"}],
        [{"Action": "", "Action_Input": "{}"}],
        [{"Action": "getFacts", "Action_Input": {"limit": 5}}],
        [{"Action": "getFacts", "Action_Input": None}],
    ],
)
def test_another_reference_is_an_error_and_not_a_zero(reference: object) -> None:
    with pytest.raises(ValueError, match="must be a list of at least one call"):
        grade("", reference)


@pytest.mark.parametrize(
    ("file", "expected"),
    [("test_97", (95, 97, [26, 33])), ("test_paper68", (66, 68, [26, 33]))],
)
def test_gold_self_test_on_the_paper_data(file: str, expected: tuple[int, int, list[int]]) -> None:
    path = DATA / "demonstrations" / "tooluse" / f"{file}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here; set SDFT_SHARED_DATA to the folder of the shared data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    references = [row["golden_answer"] for row in rows]
    result = gold_self_test("tool_call_released", references, [render_calls(r) for r in references])
    assert result == expected
