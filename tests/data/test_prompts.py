"""What student and teacher read, byte for byte, and the prompts that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sdft_lightning.data.prompts import (
    PromptStyle,
    check_same_header,
    demonstration_text,
    render_student,
    render_teacher,
    teacher_messages,
)
from sdft_lightning.errors import UserError
from sdft_lightning.types import Demonstration

# METHOD §2, with its leading and its trailing newline.
PAPER = (
    "\nWhat is 1 + 1?\n\nThis is an example for a response to the question:\nAdd.\nIt is 2.\n\n"
    "Now answer with a response of your own, including the thinking process.\n"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def row(**changes: Any) -> Demonstration:
    plain = Demonstration(
        "7", [user("What is 1 + 1?")], [assistant("It is 2.")], None, None, "a.jsonl, row 7"
    )
    return plain._replace(**changes)


def own(template: Any) -> PromptStyle:
    return PromptStyle("template", template)


def test_the_default_is_the_papers_template_byte_for_byte() -> None:
    steps = row(demonstration=[assistant("Add."), assistant("It is 2.")])
    assert teacher_messages(steps, PromptStyle()) == [user(PAPER)]
    assert PAPER[0] == "\n"
    assert PAPER[-12:] == "ng process.\n"


def test_steps_are_joined_with_newlines() -> None:
    steps = row(demonstration=[assistant("a"), assistant("b"), assistant("c")])
    assert demonstration_text(steps) == "a\nb\nc"


def test_turns_show_the_demonstration_as_an_earlier_chat_turn() -> None:
    assert teacher_messages(row(), PromptStyle("turns")) == [
        user("What is 1 + 1?"),
        assistant("It is 2."),
        user("What is 1 + 1?"),
    ]


def test_context_stands_before_both_questions() -> None:
    assert teacher_messages(row(context="Sums."), PromptStyle("context")) == [
        user("Sums.\n\nWhat is 1 + 1?"),
        assistant("It is 2."),
        user("Sums.\n\nWhat is 1 + 1?"),
    ]


@pytest.mark.parametrize("style", ["paper", "turns"])
def test_a_context_that_the_style_does_not_show_stays_hidden(style: Any) -> None:
    assert "Sums." not in str(teacher_messages(row(context="Sums."), PromptStyle(style)))


@pytest.mark.parametrize("context", [None, ""])
def test_a_missing_context_names_the_row_and_the_remedy(context: str | None) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl, row 7.*context.*data\.columns\.context"):
        teacher_messages(row(context=context), PromptStyle("context"))


def test_own_text_with_two_dollars_for_one() -> None:
    style = own("$$5 for: $prompt ($demonstration)")
    assert teacher_messages(row(), style) == [user("$5 for: What is 1 + 1? (It is 2.)")]


def test_own_turns_with_braces() -> None:
    turns = [user("${context}s: $prompt"), assistant("Fine."), user("$prompt")]
    assert teacher_messages(row(context="Sum"), own(turns)) == [
        user("Sums: What is 1 + 1?"),
        assistant("Fine."),
        user("What is 1 + 1?"),
    ]


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("$demonstration", "demonstration"),
        ("$prompt", "prompt"),
        ("none", "none"),
        ("$prompt $demonstration $golden", "golden"),
        ("$$prompt $demonstration", "demonstration"),
        ([user("$prompt $demonstration"), assistant("Yes.")], "last turn"),
        ([{"role": "user"}], "content"),
        ([{**user("$prompt $demonstration"), "name": "x"}], "nothing else"),
        ([], "each turn"),
    ],
)
def test_templates_that_cannot_work_are_refused(template: Any, named: str) -> None:
    with pytest.raises(UserError, match=r"prompts\.template.*" + named):
        own(template)


@pytest.mark.parametrize("template", ["$5: $prompt $demonstration", "$prompt $demonstration $"])
def test_a_lone_dollar_in_a_template_is_refused_before_any_row(template: str) -> None:
    with pytest.raises(UserError, match=r"prompts\.template"):
        own(template)


def test_a_template_belongs_to_its_style_and_the_style_needs_it() -> None:
    with pytest.raises(UserError, match=r"prompts\.template.*paper"):
        PromptStyle("paper", "$prompt $demonstration")
    with pytest.raises(UserError, match=r"prompts\.template"):
        PromptStyle("template")
    with pytest.raises(UserError, match=r"prompts\.style.*'chat'"):
        PromptStyle("chat")  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["paper", "turns", "context"])
def test_system_and_earlier_turns_stay_for_both_roles(tokenizer: Any, style: Any) -> None:
    earlier = [system("Be brief."), user("Hi"), assistant("Hello")]
    with_past = row(prompt=[*earlier, user("What is 1 + 1?")], context="Sums.")
    assert teacher_messages(with_past, PromptStyle(style))[:3] == earlier
    past = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n"
    )
    for text in (
        render_student(tokenizer, with_past, PromptStyle(style)),
        render_teacher(tokenizer, with_past, PromptStyle(style)),
    ):
        assert text.startswith(past)
        assert text.count("Be brief.") == 1


def test_a_demonstration_of_several_messages_stays_several_turns() -> None:
    call = [assistant("call"), {"role": "tool", "content": "2"}, assistant("It is 2.")]
    messages = teacher_messages(row(demonstration=call), PromptStyle("turns"))
    assert messages == [user("What is 1 + 1?"), *call, user("What is 1 + 1?")]


def test_a_dollar_in_the_users_text_is_untouched() -> None:
    text, answer = "Is $5 or $prompt or ${context} or $$ more?", "$demonstration $1"
    priced = row(prompt=[user(text)], demonstration=[assistant(answer)], context="$2")
    asked = user("$2\n\n" + text)
    shown = [asked, assistant(answer), asked]
    assert teacher_messages(priced, PromptStyle("context")) == shown
    own_style = own("$context: $prompt = $demonstration")
    assert teacher_messages(priced, own_style) == [user(f"$2: {text} = {answer}")]


def test_rendering_changes_neither_row_nor_style() -> None:
    before = row(context="Sums.")
    teacher_messages(before, PromptStyle("context"))
    teacher_messages(before, PromptStyle("turns"))
    assert before == row(context="Sums.")
    assert teacher_messages(row(), PromptStyle("turns"))[1] == assistant("It is 2.")


def test_needs_say_which_columns_a_style_reads() -> None:
    needs = {
        style: (PromptStyle(style).needs_demonstration, PromptStyle(style).needs_context)
        for style in ("paper", "turns", "context")
    }
    assert needs == {"paper": (True, False), "turns": (True, False), "context": (True, True)}
    assert not own("$context $prompt").needs_demonstration


STYLES = [PromptStyle(), PromptStyle("turns"), own("$prompt $demonstration")]


@pytest.mark.parametrize("style", STYLES, ids=["paper", "turns", "template"])
def test_both_prompts_end_in_the_same_header(
    tokenizer: Any, style: PromptStyle, make_tokenizer: Callable[..., Any]
) -> None:
    header = "<|im_start|>assistant\n"
    assert check_same_header(tokenizer, row(), style) == header
    assert render_student(tokenizer, row(), style).endswith(header)
    assert render_teacher(tokenizer, row(), style).endswith(header)
    assert check_same_header(make_tokenizer(None), row(), style).endswith("Answer:")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_thinking_in_one_role_only_is_refused(tokenizer: Any, role: str) -> None:
    style = PromptStyle(**{f"{role}_template_args": {"enable_thinking": True}})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"prompts.*<think>"):
        check_same_header(tokenizer, row(), style)


def test_thinking_in_both_roles_is_one_argument(tokenizer: Any) -> None:
    style = PromptStyle(chat_template_args={"enable_thinking": True})
    assert check_same_header(tokenizer, row(), style) == "<|im_start|>assistant\n<think>\n"
    assert render_student(tokenizer, row(), style).endswith("<think>\n")
