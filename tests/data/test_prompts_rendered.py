"""Rendered text: targets with their stop token, and tokenizers without a chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sdft_lightning.data.prompts import PromptStyle, render_student, render_target, render_teacher
from sdft_lightning.data.tokenize import Lengths, Tokenizer
from sdft_lightning.types import Demonstration

QUESTION = [{"role": "user", "content": "What is 1 + 1?"}]
ROW = Demonstration(
    "7", QUESTION, [{"role": "assistant", "content": "It is 2."}], None, None, "a, row 7"
)

# Writes the header in one way when asked for it, and in another before an answer.
THINKING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_student_and_teacher_text_byte_for_byte(tokenizer: Any) -> None:
    ask = "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n"
    answer = "<|im_start|>assistant\n"
    style = PromptStyle("turns")
    assert render_student(tokenizer, ROW, style) == ask + answer
    assert render_teacher(tokenizer, ROW, style) == (
        f"{ask}{answer}It is 2.<|im_end|>\n{ask}{answer}"
    )


def test_target_is_what_the_template_writes_and_holds_the_stop_token(tokenizer: Any) -> None:
    target = render_target(tokenizer, ROW, PromptStyle())
    answered = [*QUESTION, {"role": "assistant", "content": "It is 2."}]
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert render_student(tokenizer, ROW, PromptStyle()) + target == whole
    assert target == "It is 2.<|im_end|>\n"
    assert tokenizer(target, add_special_tokens=False).input_ids[-2] == tokenizer.eos_token_id


def test_target_of_several_steps_is_one_answer(tokenizer: Any) -> None:
    steps = [{"role": "assistant", "content": text} for text in ("Add.", "It is 2.")]
    target = render_target(tokenizer, ROW._replace(demonstration=steps), PromptStyle())
    assert target == "Add.\nIt is 2.<|im_end|>\n"


def test_target_without_thoughts_closes_the_thought_that_the_template_opens(
    make_tokenizer: Callable[..., Any],
) -> None:
    thinking = make_tokenizer(THINKING_TEMPLATE)
    assert render_student(thinking, ROW, PromptStyle()).endswith("<think>\n")
    # Inside of a thought that never ends it would be no answer, and is graded so.
    assert render_target(thinking, ROW, PromptStyle()) == "\n</think>\n\nIt is 2.<|im_end|>"


def test_target_ends_with_the_stop_token_without_a_chat_template(
    make_tokenizer: Callable[..., Any],
) -> None:
    assert render_target(make_tokenizer(None), ROW, PromptStyle()) == " It is 2.<|im_end|>"


def test_target_ends_with_a_stop_token_where_the_template_writes_none(
    make_tokenizer: Callable[..., Any],
) -> None:
    bare = make_tokenizer(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    ids = Tokenizer(bare, PromptStyle(), Lengths(), [bare.eos_token_id])(ROW).demonstration_ids
    assert bare.decode(ids).startswith("It is 2.")
    assert ids[-1] == bare.eos_token_id


def test_a_tokenizer_without_chat_template_gives_the_documented_plain_format(
    make_tokenizer: Callable[..., Any],
) -> None:
    plain = make_tokenizer(None)
    asked = ROW._replace(prompt=[{"role": "system", "content": "Be brief."}, *QUESTION])
    assert render_student(plain, asked, PromptStyle("turns")) == (
        "Be brief.\n\nQuestion: What is 1 + 1?\n\nAnswer:"
    )
    assert render_teacher(plain, asked, PromptStyle("turns")) == (
        "Be brief.\n\nQuestion: What is 1 + 1?\n\nAnswer: It is 2.\n\n"
        "Question: What is 1 + 1?\n\nAnswer:"
    )


@pytest.mark.parametrize("style", ["paper", "turns"])
def test_prompt_and_target_go_on_as_in_the_plain_format(
    make_tokenizer: Callable[..., Any], style: Any
) -> None:
    plain = make_tokenizer(None)
    text = render_student(plain, ROW, PromptStyle(style)) + render_target(
        plain, ROW, PromptStyle(style)
    )
    assert text == "Question: What is 1 + 1?\n\nAnswer: It is 2.<|im_end|>"


def test_student_arguments_override_those_of_both_roles(tokenizer: Any) -> None:
    style = PromptStyle(
        chat_template_args={"enable_thinking": True},
        student_template_args={"enable_thinking": False},
    )
    assert not render_student(tokenizer, ROW, style).endswith("<think>\n")
    assert render_teacher(tokenizer, ROW, style).endswith("<think>\n")
