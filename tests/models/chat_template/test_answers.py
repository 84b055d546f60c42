"""What graders get of a completion: all that was said, without the thoughts before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sdft_lightning.models.chat_template import AnswerReader, known_thoughts, without_thoughts

IM_END = 2


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So: 4.", "So: 4."),
        (" So: 4.\n", " So: 4.\n"),
        ("<think>BECAUSE</think>So: 4.", "So: 4."),
        ("\n<think>\nBECAUSE\n</think>\n\nSo: 4.\n", "So: 4.\n"),
        ("BECAUSE</think>So: 4.", "So: 4."),
        ("A</think>B</think>So: 4.", "So: 4."),
        ("<think>A</think>So: <think>B</think>4.", "So: 4."),
        ("<think>BECAUSE", ""),
        ("<think>A</think>So<think>B", "So"),
        ("<think></think>", ""),
    ],
)
def test_thoughts_are_left_out_and_one_that_never_ends_is_no_answer(
    text: str, answer: str, tokenizer: Any
) -> None:
    assert without_thoughts(text, known_thoughts(tokenizer)) == answer


def test_thought_that_the_prompt_opened_is_one(with_template: Callable[[str], Any]) -> None:
    tokenizer = with_template("opens_thinking")
    reader = AnswerReader(tokenizer, [IM_END])
    prompt = ids_of(tokenizer, "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    opened = reader.opened(prompt)
    assert opened is not None
    assert reader.answer("BECAUSE\n</think>\nSo: 4.", opened) == "So: 4."
    assert reader.answer("BECAUSE", opened) == ""
    closed = ids_of(tokenizer, "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert reader.opened(closed) is None
    asked = ids_of(
        tokenizer, "<|im_start|>user\nWhat is <think><|im_end|>\n<|im_start|>assistant\n"
    )
    assert reader.opened(asked) is None


def test_special_tokens_of_an_answer_stay_and_those_of_the_conversation_do_not(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    reader = AnswerReader(tokenizer, [IM_END])
    call = '<tool_call>{"name": "f"}</tool_call>'
    ids = ids_of(tokenizer, f"<think>A</think>{call}<|im_end|>\n<|im_start|><|endoftext|>")
    assert reader.text(ids) == f"<think>A</think>{call}\n"
    assert reader.answer(reader.text(ids)) == call + "\n"
    assert reader.text(ids_of(tokenizer, "So: 4.<|im_end|>")) == "So: 4."


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ("[THINK]", "[THINK]A[/THINK]So: 4."),
        ("<reason>\n", "<reason>\nA</reason>So: 4."),
        ("<|START_THINKING|>", "<|START_THINKING|>A<|END_THINKING|>So: 4."),
    ],
)
def test_markers_of_a_model_s_own_are_found_in_its_template(
    header: str, text: str, make_tokenizer: Callable[..., Any]
) -> None:
    closing = {"[THINK]": "[/THINK]", "<|START_THINKING|>": "<|END_THINKING|>"}.get(header, "")
    tokenizer = make_tokenizer(
        "{# " + closing + " #}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{{ '" + header.replace("\n", "\\n") + "' }}{% endif %}"
    )
    assert without_thoughts(text, known_thoughts(tokenizer)) == "So: 4."
    reader = AnswerReader(tokenizer, [IM_END])
    opened = reader.opened(ids_of(tokenizer, "<|im_start|>assistant\n" + header))
    assert reader.answer(text.removeprefix(header.strip()), opened) == "So: 4."


def test_header_in_angle_brackets_is_no_thought(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    reader = AnswerReader(tokenizer, [IM_END])
    assert reader.opened(ids_of(tokenizer, "<assistant>\n")) is None
    assert reader.answer("So: 4.") == "So: 4."


def test_channels_of_gpt_oss_are_thoughts_up_to_the_final_one(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokens = ["<|start|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>"]
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final"
        "{% endif %}<|message|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == "
        "'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.eos_token = "<|return|>"
    reader = AnswerReader(tokenizer, [tokenizer.eos_token_id])
    said = (
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>So: 4."
    )
    for text in (said, said[said.index("<|channel|>final") :]):
        read = reader.text(ids_of(tokenizer, text + "<|return|>"))
        assert reader.answer(read) == "So: 4."
