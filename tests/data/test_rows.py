"""From raw rows to demonstrations: the column map, and the checks of form."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from sdft_lightning.data.rows import Columns, columns_of_questions, parse_rows
from sdft_lightning.data.sources import Rows
from sdft_lightning.errors import UserError
from sdft_lightning.graders import check_reference
from sdft_lightning.types import Demonstration, RowNeeds

ASK = {"role": "user", "content": "Q?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "It is so."}


def parse(
    *rows: dict[str, Any],
    needs: RowNeeds = RowNeeds(),  # noqa: B008 - frozen
    grader: str | None = None,
    **columns: Any,
) -> list[Demonstration]:
    found = Rows("rows.jsonl", list(rows), [f"line {n}" for n in range(1, len(rows) + 1)])
    check = None if grader is None else partial(check_reference, grader)
    return parse_rows(found, Columns(**columns), needs, check)


@pytest.mark.parametrize(
    "demonstration",
    [
        "It is so.",
        ["It is so."],
        [ANSWER],
        [ASK, ANSWER],
        [{**ANSWER, "name": "expert"}],
    ],
)
def test_demonstration_may_be_text_steps_messages_or_a_whole_conversation(
    demonstration: Any,
) -> None:
    (row,) = parse({"prompt": "Q?", "demonstration": demonstration})
    assert row.prompt == [ASK]
    assert row.demonstration == [ANSWER]


def test_steps_are_joined_with_newlines() -> None:
    (row,) = parse({"prompt": "Q?", "demonstration": ["Action: a", "Action: b"]})
    assert row.demonstration == [{"role": "assistant", "content": "Action: a\nAction: b"}]


def test_conversation_keeps_its_system_turn_in_the_prompt_and_several_answers_apart() -> None:
    more = [ANSWER, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    (row,) = parse({"prompt": [SYSTEM, ASK], "demonstration": [SYSTEM, ASK, *more]})
    assert row.prompt == [SYSTEM, ASK]
    assert row.demonstration == more


def test_columns_map_all_roles_and_ids_default_to_the_number_of_the_row() -> None:
    raw = {"q": "Q?", "a": "It is so.", "text": "Source.", "gold": "so", "key": 7}
    names = {"prompt": "q", "demonstration": "a", "context": "text", "reference": "gold"}
    (row,) = parse(raw, **names, id="key")
    assert row == Demonstration("7", [ASK], [ANSWER], "Source.", "so", "rows.jsonl, line 1")
    first, second = parse(raw, raw, **names)
    assert (first.id, second.id) == ("0", "1")


def test_rows_without_demonstration_are_let_through_where_only_a_grade_is_wanted() -> None:
    rows = parse(
        {"prompt": "Q?"}, {"prompt": "R?", "demonstration": ""}, needs=RowNeeds(demonstration=False)
    )
    assert [row.demonstration for row in rows] == [[], []]


def test_rows_to_pretrain_on_need_a_context_and_neither_prompt_nor_demonstration() -> None:
    needs = RowNeeds(prompt=False, demonstration=False, context=True)
    (row,) = parse({"text": "Source."}, needs=needs, context="text")
    assert (row.prompt, row.demonstration, row.context) == ([], [], "Source.")
    (row,) = parse({"prompt": "Q?", "text": "Source."}, needs=needs, context="text")
    assert row.prompt == []


def test_row_without_the_context_that_is_trained_on_is_named_with_the_remedy() -> None:
    needs = RowNeeds(prompt=False, demonstration=False, context=True)
    for empty in (None, "", " \n"):
        with pytest.raises(UserError) as error:
            parse({"text": "Source."}, {"text": empty}, needs=needs, context="text")
        for word in ("rows.jsonl, line 2", "context", "'text'", "is empty", "Fill it or remove"):
            assert word in str(error.value)
    with pytest.raises(UserError) as error:
        parse({"text": "Source.", "prompt": "Q?"}, needs=needs)
    for word in ("data.columns.context", "rows.jsonl", "prompt, text", "--data.columns.context"):
        assert word in str(error.value)


def test_references_are_checked_only_where_rows_are_graded() -> None:
    raw = {"prompt": "Q?", "demonstration": "A", "gold": "perhaps"}
    (row,) = parse(raw, reference="gold")
    assert row.reference == "perhaps"
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: grader 'choice'.*'perhaps'"):
        parse(raw, reference="gold", grader="choice")


PROMPT = {"demonstration": "A"}
ERRORS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "missing_prompt_column": (
        [{"question": "Q?", "demonstration": "A"}],
        {},
        ["data.columns.prompt", "'prompt'", "demonstration, question", "--data.columns.prompt"],
    ),
    "missing_demonstration_column": (
        [{"prompt": "Q?", "answer": "A"}],
        {},
        ["data.columns.demonstration", "'demonstration'", "answer, prompt"],
    ),
    "missing_context_column": (
        [{"prompt": "Q?", **PROMPT}],
        {"context": "text"},
        ["data.columns.context", "'text'", "demonstration, prompt"],
    ),
    "no_reference_column": (
        [{"prompt": "Q?", **PROMPT}],
        {"grader": "contains"},
        ["data.columns.reference", "graded", "demonstration, prompt"],
    ),
    "row_without_reference": (
        [{"prompt": "Q?", **PROMPT, "gold": "a"}, {"prompt": "Q?", **PROMPT}],
        {"grader": "contains", "reference": "gold"},
        ["rows.jsonl, line 2", "'contains'", "None"],
    ),
    "empty_demonstration": (
        [{"prompt": "Q?", "demonstration": "A"}, {"prompt": "Q?", "demonstration": " \n"}],
        {},
        ["rows.jsonl, line 2", "'demonstration'", "is empty", "remove the row"],
    ),
    "no_steps": ([{"prompt": "Q?", "demonstration": []}], {}, ["line 1", "is empty"]),
    "empty_steps": ([{"prompt": "Q?", "demonstration": ["", " "]}], {}, ["line 1", "is empty"]),
    "empty_message": (
        [{"prompt": "Q?", "demonstration": [{**ANSWER, "content": ""}]}],
        {},
        ["line 1", "is empty"],
    ),
    "conversation_without_answer": (
        [{"prompt": [ASK], "demonstration": [ASK]}],
        {},
        ["line 1", "is empty"],
    ),
    "conversation_of_another_prompt": (
        [{"prompt": "Q?", "demonstration": [{**ASK, "content": "R?"}, ANSWER]}],
        {},
        ["line 1", "starts with the prompt", "user, assistant"],
    ),
    "no_user_turn": ([{"prompt": [SYSTEM], **PROMPT}], {}, ["line 1", "no user turn"]),
    "no_turn": ([{"prompt": [], **PROMPT}], {}, ["line 1", "no user turn"]),
    "last_turn_not_user": (
        [{"prompt": [ASK, ANSWER], **PROMPT}],
        {},
        ["line 1", "ends with the role assistant", "demonstration column"],
    ),
    "empty_prompt": ([{"prompt": " ", **PROMPT}], {}, ["line 1", "prompt", "is empty"]),
    "no_prompt": ([{"prompt": None, **PROMPT}], {}, ["line 1", "'prompt'", "got nothing"]),
    "number_as_prompt": ([{"prompt": 3, **PROMPT}], {}, ["line 1", "'prompt'", "got int"]),
    "texts_as_prompt": ([{"prompt": ["a"], **PROMPT}], {}, ["line 1", "a list of str"]),
    "picture_as_content": (
        [{"prompt": [{"role": "user", "content": [{"type": "image"}]}], **PROMPT}],
        {},
        ["line 1", "text as content", "type list"],
    ),
    "unknown_role": (
        [{"prompt": [{"role": "human", "content": "Q?"}], **PROMPT}],
        {},
        ["line 1", "'human'", "system, user, assistant, tool"],
    ),
    "number_as_demonstration": (
        [{"prompt": "Q?", "demonstration": 3}],
        {},
        ["line 1", "'demonstration'", "got int"],
    ),
    "context_not_text": (
        [{"prompt": "Q?", **PROMPT, "text": ["a"]}],
        {"context": "text"},
        ["line 1", "'text'", "must be a text", "got list"],
    ),
    "same_id_twice": (
        [{"prompt": "Q?", **PROMPT, "key": 1}, {"prompt": "R?", **PROMPT, "key": "1"}],
        {"id": "key"},
        ["rows.jsonl, line 2", "'1'", "rows.jsonl, line 1", "data.columns.id"],
    ),
    "row_without_id": (
        [{"prompt": "Q?", **PROMPT, "key": "a"}, {"prompt": "R?", **PROMPT, "key": None}],
        {"id": "key"},
        ["rows.jsonl, line 2", "id", "'key'"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_row_is_named_with_its_fault_and_the_remedy(name: str) -> None:
    rows, options, words = ERRORS[name]
    with pytest.raises(UserError) as error:
        parse(*rows, **options)
    for word in words:
        assert word in str(error.value)


TOOL_TURNS = [ANSWER, {"role": "tool", "content": "7:30"}, {"role": "assistant", "content": "Yes."}]


def test_turns_of_others_may_be_shown_but_not_predicted() -> None:
    (row,) = parse({"prompt": "Q?", "demonstration": TOOL_TURNS})
    assert row.demonstration == TOOL_TURNS
    with pytest.raises(UserError, match=r"line 1: the demonstration .* turns of the role tool"):
        parse({"prompt": "Q?", "demonstration": TOOL_TURNS}, needs=RowNeeds(target=True))
    several = [ANSWER, {"role": "assistant", "content": "Yes."}]
    (row,) = parse({"prompt": "Q?", "demonstration": several}, needs=RowNeeds(target=True))
    assert row.demonstration == several


@pytest.mark.parametrize("name", ["tool_calls", "function_call"])
def test_calls_beside_the_content_are_refused_rather_than_lost(name: str) -> None:
    call = {**ANSWER, name: [{"name": "hours"}]}
    for row in ({"prompt": "Q?", "demonstration": [call]}, {"prompt": [call, ASK]}):
        with pytest.raises(UserError, match=rf"line 1: .* has {name}, which would be lost"):
            parse({"demonstration": "It is so.", **row})
    (found,) = parse({"prompt": "Q?", "demonstration": [{**ANSWER, name: None}]})
    assert found.demonstration == [ANSWER]


def test_questions_need_no_column_but_their_own() -> None:
    found = Rows("q.jsonl", [{"prompt": "Q?"}], ["line 1"])
    whole = Columns(context="context", reference="reference", id="id")
    (row,) = parse_rows(found, columns_of_questions(found, whole), RowNeeds(demonstration=False))
    assert (row.id, row.prompt) == ("0", [ASK])
    named = Rows("q.jsonl", [{"prompt": "Q?", "id": "mine"}], ["line 1"])
    (row,) = parse_rows(named, columns_of_questions(named, whole), RowNeeds(demonstration=False))
    assert row.id == "mine"


JSON_PROMPT = '[{"role": "user", "content": "When does the ferry leave?"}]'
JSON_ANSWER = '[{"role": "assistant", "content": "At 7:40."}]'
JSON_TALK = (
    '[{"role": "system", "content": "Answer briefly."}, '
    '{"role": "user", "content": "Who runs the desk?"}]'
)


def test_messages_as_json_text_are_read_as_messages_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    looks_like_it = "[1] and [2] are footnotes. What is [1]?"
    with caplog.at_level("WARNING"):
        first, second, third = parse(
            {"prompt": JSON_PROMPT, "demonstration": JSON_ANSWER},
            {"prompt": JSON_TALK, "demonstration": "Marta."},
            {"prompt": looks_like_it, "demonstration": "A footnote."},
        )
    assert first.prompt == [{"role": "user", "content": "When does the ferry leave?"}]
    assert first.demonstration == [{"role": "assistant", "content": "At 7:40."}]
    assert [message["role"] for message in second.prompt] == ["system", "user"]
    assert second.demonstration == [{"role": "assistant", "content": "Marta."}]
    assert third.prompt == [{"role": "user", "content": looks_like_it}]
    prompts, demonstrations = (record.message for record in caplog.records)
    assert (
        "column 'prompt' holds chat messages as text in 2 of 3 rows (the first: line 1)" in prompts
    )
    assert "column 'demonstration' holds chat messages as text in 1 of 3 rows" in demonstrations


@pytest.mark.parametrize(
    "text",
    [
        '{"role": "user", "content": "Q?"}',
        "  \n" + '[{"role": "user", "content": "Q?"}]' + "\n",
        "[{'role': 'user', 'content': 'Q?'}]",
        ['{"role": "user", "content": "Q?"}'],
        '[{"role": "user", "content": "Q?", "name": null}]',
    ],
)
def test_messages_as_text_have_many_forms(text: Any) -> None:
    (found,) = parse({"prompt": text, "demonstration": "A."})
    assert found.prompt == [ASK]


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "role", "content": "x"}]',
        '[{"role": "admin", "content": "x"}]',
        '[{"role": "user", "content": "x"}] is a list. What is its role?',
        '{"role": "user"}',
        '["role", "content"]',
        "[]",
        "{role}",
        "[role" * 5000,
        '[{"role": "user", "content": "x"}, 3]',
    ],
)
def test_text_that_only_looks_like_messages_stays_a_text(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (found,) = parse({"prompt": text, "demonstration": text})
    assert found.prompt == [{"role": "user", "content": text}]
    assert not caplog.records


def test_messages_as_json_text_are_checked_as_messages_are() -> None:
    with pytest.raises(UserError, match=r"line 1: the conversation.*ends with the role assistant"):
        parse({"prompt": f"[{JSON_PROMPT[1:-1]}, {JSON_ANSWER[1:-1]}]", "demonstration": "A."})
    with pytest.raises(UserError, match=r"line 1: a message.*type int"):
        parse({"prompt": '[{"role": "user", "content": 3}]', "demonstration": "A."})
    with pytest.raises(UserError, match=r"line 1: the messages.*lone surrogate"):
        parse({"prompt": '[{"role": "user", "content": "\\ud83d"}]', "demonstration": "A."})
    (whole,) = parse(
        {"prompt": JSON_PROMPT, "demonstration": f"[{JSON_PROMPT[1:-1]}, {JSON_ANSWER[1:-1]}]"}
    )
    assert whole.demonstration == [{"role": "assistant", "content": "At 7:40."}]
