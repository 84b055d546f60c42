"""Targets as token ids: with their prompts they are the conversation, as the model would see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sdft_lightning.data.prompts import PromptStyle, answered_conversation
from sdft_lightning.data.tokenize import Lengths, Tokenizer
from sdft_lightning.models.chat_template import answer_ids, render_all
from sdft_lightning.types import Demonstration

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
PLAIN_HEADER = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# The header ends in a line feed, and some answers begin with one: both are one token.
FALCON = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def tokenized(tokenizer: Any, row: Demonstration) -> tuple[list[int], list[int], list[int]]:
    """Ids of the prompt, of the target, and of the conversation rendered whole up to its end."""
    tokens = Tokenizer(tokenizer, PromptStyle(), Lengths(), [tokenizer.eos_token_id])(row)
    (whole,) = render_all(tokenizer, [answered_conversation(row, PromptStyle())])
    ids = list(tokenizer(whole, add_special_tokens=False).input_ids)
    last = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return tokens.prompt_ids, tokens.demonstration_ids, ids[:last]


TEXTS = ["So: 4.", "  So: 4.\n", "<think>\nBECAUSE\n</think>\n\nSo: 4."]
CASES = [
    (name, text)
    for name in (
        "blank_before_answer",
        "opens_thinking",
        "drops_system",
        "drops_thinking",
        "qwen3_like",
        "llama3_like",
        "gemma2_like",
        "gemma3_like",
        "mistral_like",
        "phi_like",
    )
    for text in TEXTS
    # Without a thought no conversation of that template begins with its prompt: another test's.
    if name != "opens_thinking" or "think" in text
]


@pytest.mark.parametrize(("name", "text"), CASES)
def test_prompt_and_target_are_the_conversation_rendered_whole(
    name: str, text: str, with_template: Callable[[str], Any], make_row: Callable[..., Any]
) -> None:
    tokenizer = with_template(name)
    if name in ("blank_before_answer", "drops_system"):  # those end turns with other tokens
        end = "</s>" if name == "blank_before_answer" else "<|end|>"
        tokenizer.chat_template = tokenizer.chat_template.replace(end, "<|im_end|>")
    prompt, target, whole = tokenized(tokenizer, make_row(demonstration=text))
    if name == "phi_like":  # which writes one more token behind the last turn
        whole = whole[: whole.index(tokenizer.eos_token_id, len(prompt)) + 1]
    assert prompt + target == whole


def test_blank_between_header_and_answer_is_part_of_the_target(
    with_template: Callable[[str], Any], make_row: Callable[..., Any]
) -> None:
    tokenizer = with_template("mistral_like")
    _, target, _ = tokenized(tokenizer, make_row())
    assert tokenizer.decode(target) == " It is 2.<|im_end|>"


def test_thought_that_the_prompt_opens_is_opened_once(
    with_template: Callable[[str], Any], make_row: Callable[..., Any]
) -> None:
    tokenizer = with_template("opens_thinking")
    for text in ("<think>\nBECAUSE\n</think>\nSo: 4.", "<think>BECAUSE</think>So: 4."):
        prompt, target, _ = tokenized(tokenizer, make_row(demonstration=text))
        assert tokenizer.decode(prompt + target).count("<think>") == 1
        assert tokenizer.decode(target).startswith("BECAUSE")


def test_thought_that_the_template_drops_of_the_last_turn_is_trained_all_the_same(
    with_template: Callable[[str], Any], make_row: Callable[..., Any]
) -> None:
    text = "<think>\nBECAUSE\n</think>\n\nSo: 4."
    tokenizer = with_template("r1_like")  # opens a thought, and drops it of a turn that is given
    _, target, _ = tokenized(tokenizer, make_row(demonstration=text))
    assert tokenizer.decode(target) == "BECAUSE\n</think>\n\nSo: 4.<|im_end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\n", "")  # opens none
    _, target, _ = tokenized(tokenizer, make_row(demonstration=text))
    assert tokenizer.decode(target) == text + "<|im_end|>"


@pytest.mark.parametrize("prepend", ["first", "always", "legacy"])
@pytest.mark.parametrize("template", [LLAMA2, PLAIN_HEADER], ids=["blank", "line"])
def test_target_of_a_sentencepiece_tokenizer_begins_without_a_blank_of_its_own(
    prepend: str,
    template: str,
    sentencepiece_like: Callable[..., Any],
    make_row: Callable[..., Any],
) -> None:
    tokenizer = sentencepiece_like(template, prepend)
    prompt, target, whole = tokenized(tokenizer, make_row("Q?", "It"))
    assert prompt + target == whole
    begins = tokenizer.convert_ids_to_tokens(target)[:2]
    alone = tokenizer.convert_ids_to_tokens(tokenizer("It", add_special_tokens=False).input_ids)
    assert alone == ["▁It"]  # which was trained behind a line feed, too
    if template == PLAIN_HEADER:
        assert begins == ["I", "t"]
    assert tokenizer.decode(whole).count("It") == 1


@pytest.mark.parametrize("prepend", ["first", "always", "legacy"])
def test_answer_that_merges_with_the_prompt_is_tokenized_alone_and_the_prompt_stays(
    prepend: str, sentencepiece_like: Callable[..., Any], make_row: Callable[..., Any]
) -> None:
    tokenizer = sentencepiece_like(FALCON, prepend)
    prompt, target, whole = tokenized(tokenizer, make_row("Q?", "\nIt"))
    assert whole[: len(prompt)] != prompt  # the whole has one token for both line feeds
    assert tokenizer.convert_ids_to_tokens(prompt)[-2:] == [":", "\n"]
    assert tokenizer.convert_ids_to_tokens(target) == ["\n", "I", "t", "</s>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [(LLAMA2, ["▁It"]), (PLAIN_HEADER, ["I", "t"]), (None, ["▁It"])],
    ids=["blank", "line", "none"],
)
def test_given_completion_is_tokenized_as_an_answer_behind_a_prompt(
    template: str | None, said: list[str], sentencepiece_like: Callable[..., Any]
) -> None:
    tokenizer = sentencepiece_like(template)
    for text in {"It", " It"} if said == ["▁It"] else {"It"}:
        found = tokenizer.convert_ids_to_tokens(answer_ids(tokenizer, text))
        assert [token for token in found if token != "▁"] == said
    assert answer_ids(tokenizer, "") == []


def test_plain_format_keeps_its_blank_before_the_answer(
    make_tokenizer: Callable[..., Any], make_row: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer(None)
    tokens = Tokenizer(tokenizer, PromptStyle(), Lengths(), [tokenizer.eos_token_id])(make_row())
    assert tokenizer.decode(tokens.prompt_ids + tokens.demonstration_ids) == (
        "Question: What is 1 + 1?\n\nAnswer: It is 2.<|im_end|>"
    )
    assert tokenizer.decode(answer_ids(tokenizer, "It")) == " It"
