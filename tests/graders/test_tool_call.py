"""The strict tool-call grader sees what the released one does not."""

import json
import os
import time
from pathlib import Path

import pytest

from sdft_lightning.errors import UserError
from sdft_lightning.graders import get_grader, gold_self_test
from sdft_lightning.graders.tool_call import render_calls

DATA = Path(os.environ.get("SDFT_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared/data"))
NESTED = [{"Action": "save", "Action_Input": '{"user": {"id": 1, "tags": ["a", {"b": null}]}}'}]
TWO = [
    {"Action": "find", "Action_Input": '{"name": "x"}'},
    {"Action": "drop", "Action_Input": '{"id": 1}'},
]
OPTIONAL = [TWO[0], {"Action": "[Optional]log", "Action_Input": "{}"}, TWO[1]]
grade = get_grader("tool_call")


def call(name: str, arguments: str) -> str:
    return f"Action: {name}\nAction Input: {arguments}\n"


def test_nested_arguments_count() -> None:
    assert grade(render_calls(NESTED), NESTED) == 1.0
    changed = render_calls(NESTED).replace('"b": null', '"b": 0')
    assert grade(changed, NESTED) == 0.0
    over_lines = "Action: save\nAction Input:\n" + json.dumps(
        json.loads(NESTED[0]["Action_Input"]), indent=2
    )
    assert grade(over_lines, NESTED) == 1.0


def test_calls_keep_their_order_and_their_own_arguments() -> None:
    assert grade("I look.\n" + render_calls(TWO) + "\nThought: done.", TWO) == 1.0
    assert grade(render_calls(TWO[::-1]), TWO) == 0.0
    assert grade(call("find", '{"id": 1}') + call("drop", '{"name": "x"}'), TWO) == 0.0
    assert grade(render_calls([*TWO, TWO[1]]), TWO) == 0.0
    assert grade(render_calls(TWO[:1]), TWO) == 0.0


def test_an_earlier_call_with_another_argument_is_not_hidden_by_a_later_one() -> None:
    gold = [{"Action": "get", "Action_Input": f'{{"id": {i}}}'} for i in (1, 2)]
    assert grade(call("get", '{"id": 9}') + call("get", '{"id": 2}'), gold) == 0.0


@pytest.mark.parametrize("kept", [OPTIONAL, [OPTIONAL[0], OPTIONAL[2]]])
def test_an_optional_action_may_be_left_out(kept: list[dict[str, str]]) -> None:
    assert grade(render_calls(kept), OPTIONAL) == 1.0
    assert grade(render_calls(kept).replace("[Optional]", ""), OPTIONAL) == 1.0


def test_an_optional_action_must_be_right_where_it_is_made() -> None:
    assert grade(render_calls(OPTIONAL).replace("{}", '{"a": 1}'), OPTIONAL) == 0.0
    assert grade(render_calls(OPTIONAL[1:]), OPTIONAL) == 0.0


@pytest.mark.parametrize(
    ("arguments", "score"),
    [
        ('{"limit": 1}', 1.0),
        ('{"limit": 1.0}', 1.0),
        ('{"limit": 1} and so on', 1.0),
        ('{"limit": true}', 0.0),
        ('{"limit": "1"}', 0.0),
        ('{"limit": 1, "page": 1}', 0.0),
        ("{'limit': 1}", 0.0),
        ('{"limit": 1', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_arguments_equal_in_value_and_type(arguments: str, score: float) -> None:
    gold = [{"Action": "get", "Action_Input": '{"limit": 1}'}]
    assert grade(call("get", arguments), gold) == score


def test_an_action_without_input_or_with_another_name_is_wrong() -> None:
    gold = [{"Action": "get-facts", "Action_Input": "{}"}]
    assert grade(call("get-facts", "{}"), gold) == 1.0
    assert grade(call("get", "{}"), gold) == 0.0
    assert grade("Action: get-facts", gold) == 0.0
    assert grade(call("get-facts", "{}") + "Action: get-facts", gold) == 0.0
    assert grade("", gold) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "Action:" + " " * 20_000,
        "Action:" + " " * 20_000 + "x",
        "Action: get" + "\t" * 20_000 + "Action Inpu",
        "Action: get" + "\n" * 20_000,
        "Action: get\n" * 1600,
        "Action: get Action Input: [" * 800,
        "Action: get\nAction Input: [" * 800,
        "Action: get\nAction Input: " + "9" * 20_000,
    ],
)
def test_a_completion_that_repeats_itself_is_graded_within_a_second(text: str) -> None:
    gold = [{"Action": "get", "Action_Input": "{}"}]
    start = time.process_time()
    assert grade(text, gold) == 0.0
    assert time.process_time() - start < 1


def test_blanks_around_a_name_do_not_belong_to_it() -> None:
    gold = [{"Action": "get facts", "Action_Input": "{}"}]
    for text in (
        " Action: \t get facts \t\n\n Action Input: {}",
        "Action:get facts Action Input:{}",
        "Action: [Optional] get facts  Action Input:  \n  {}",
    ):
        assert grade(text, gold) == 1.0, text


def test_malformed_gold_must_be_repeated_word_for_word() -> None:
    gold = [{"Action": "get", "Action_Input": '{"a": 1'}]
    assert grade(call("get", '{"a":  1'), gold) == 1.0
    assert grade(call("get", '{"a": 2'), gold) == 0.0


def test_a_reference_of_another_form_is_named() -> None:
    with pytest.raises(UserError, match="Action_Input"):
        grade("", [{"Action": "get"}])


@pytest.mark.parametrize(("file", "released"), [("test_97.jsonl", 95), ("test_paper68.jsonl", 66)])
def test_every_gold_answer_of_the_published_sets_passes(file: str, released: int) -> None:
    path = DATA / "demonstrations/tooluse" / file
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    gold = [row["golden_answer"] for row in rows]
    texts = [render_calls(calls) for calls in gold]
    assert gold_self_test("tool_call", gold, texts).passed == len(rows)
    assert gold_self_test("tool_call_released", gold, texts).passed == released
