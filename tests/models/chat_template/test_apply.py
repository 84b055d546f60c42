"""Chat templates that fail, loop, or are none: one sentence each, within seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sdft_lightning.data.prompts import PromptStyle, check_headers, render_student
from sdft_lightning.errors import UserError
from sdft_lightning.models.chat_template import apply, render, render_all
from sdft_lightning.models.chat_template.apply import Conversation
from sdft_lightning.types import RowNeeds

ASKED = [{"role": "user", "content": "Q?"}]
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A limit of a fraction of a second."""
    monkeypatch.setattr(apply, "SECONDS", 0.5)
    yield
    for renderer in apply._KEPT:
        renderer.close()
    apply._KEPT.clear()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('No system turns') }}", "refuses.*user: No system turns .*'Q\\?'"),
        ("{{ 1 / 0 }}", "fails on.*ZeroDivisionError: division by zero"),
        ("{{ messages[0].content + 1 }}", "fails on.*TypeError"),
        ("{{ messages[7].content }}", "refuses.*UndefinedError"),
        ("{{ tools[0].name }}", "refuses.*UndefinedError"),
        ("{% for m in %}", "refuses.*TemplateSyntaxError"),
        ("{% include 'other' %}", "fails on.*TypeError: no loader"),
        ("{{ messages.__class__.__mro__ }}", "refuses.*SecurityError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "fails on.*RecursionError"),
        ("", "fails on.*makes nothing"),
        ("{# nothing #}", "fails on.*makes nothing"),
    ],
)
def test_template_that_fails_is_a_sentence_that_names_the_row(
    template: str, words: str, make_tokenizer: Callable[..., Any], make_row: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer(template)
    with pytest.raises(UserError, match=r"^a\.jsonl, row 7: the model's chat template " + words):
        render_student(tokenizer, make_row("Q?"), PromptStyle())
    with pytest.raises(UserError, match=r"data\.prompts\.chat_template_args"):
        render(tokenizer, ASKED, {})


@pytest.mark.attack
@pytest.mark.parametrize(
    ("template", "words"),
    [
        (FOREVER, "more than 0.5 s of processor time"),
        ("{{ 'a' * 10 ** 10 }}", "more than 512 MiB of memory"),
        (DOUBLED, "more than 512 MiB of memory|processor time"),
        ("{{ '%9999999999d' % 1 }}", "more than 512 MiB of memory"),
        ("{{ 'ab' * 9000000 }}", "has 18000000 characters, allowed are 8388608"),
        ("{{ (10 ** 9999999) // 7 ** 9999 }}", "processor time|ValueError"),
    ],
    ids=["loop", "product", "doubled", "format", "long", "number"],
)
def test_template_that_loops_or_eats_memory_ends_soon_and_the_run_does_not(
    template: str,
    words: str,
    make_tokenizer: Callable[..., Any],
    short_limit: None,
) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=rf"fails on a conversation of the roles user: .*({words})"):
        render(make_tokenizer(template), ASKED, {})
    assert time.process_time() - start < 5  # of this process
    assert render(make_tokenizer("fine"), ASKED, {}) == "fine"


def test_first_conversation_that_exceeds_a_limit_is_named_and_others_are_rendered(
    make_tokenizer: Callable[..., Any], short_limit: None
) -> None:
    tokenizer = make_tokenizer("{% if 'loop' in messages[0].content %}" + FOREVER + "{% endif %}x")
    rows = [
        Conversation([{"role": "user", "content": text}], {}, where=f"row {number}")
        for number, text in enumerate(["Q?", "loop", "Q?"], start=1)
    ]
    with pytest.raises(UserError, match=r"^row 2: .*processor time"):
        render_all(tokenizer, rows)
    assert render_all(tokenizer, [rows[0], rows[2]]) == ["x", "x"]


def test_process_that_has_left_for_want_of_work_is_started_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "_IDLE_SECONDS", 0.05)
    apply._KEPT[:] = []
    first = render(tokenizer, ASKED, {})
    process = apply._KEPT[0]._process
    process.join(10)
    assert process.exitcode == 0
    assert render(tokenizer, ASKED, {}) == first
    apply._KEPT[:] = []


def test_changed_template_and_changed_tokens_are_seen(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("{{ eos_token }}!")
    assert render(tokenizer, ASKED, {}) == "<|im_end|>!"
    tokenizer.eos_token = "<|endoftext|>"
    assert render(tokenizer, ASKED, {}) == "<|endoftext|>!"
    tokenizer.chat_template = "{{ eos_token }}?"
    assert render(tokenizer, ASKED, {}) == "<|endoftext|>?"


def test_rendering_is_the_tokenizers_own(tokenizer: Any) -> None:
    own = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, ASKED, {}) == own
    assert os.getpid() == apply._KEPT[0].owner


def test_several_templates_without_a_default_are_named_with_the_remedy(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer({"rag": "R {{ messages[0].content }}", "plain": "P"})
    with pytest.raises(UserError, match=r"\(plain, rag\), and none is the default.*rag\}'"):
        render(tokenizer, ASKED, {})
    with pytest.raises(UserError, match="'tools' is none of them"):
        render(tokenizer, ASKED, {"chat_template": "tools"})
    assert render(tokenizer, ASKED, {"chat_template": "rag"}) == "R Q?"
    tokenizer.chat_template = {"default": "D", "rag": "R"}
    assert render(tokenizer, ASKED, {}) == "D"


def test_template_that_ignores_the_generation_prompt_is_refused(
    make_tokenizer: Callable[..., Any], with_template: Callable[[str], Any], make_row: Any
) -> None:
    ignores = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    style, needs = PromptStyle(), RowNeeds()
    with pytest.raises(UserError, match=r"ignores add_generation_prompt.*assistant\\n"):
        check_headers(ignores, [make_row()], style, needs)
    for name in ("mistral_like", "qwen3_like", "r1_like", "phi_like", "opens_thinking"):
        check_headers(with_template(name), [make_row()], style, needs)  # mistral has no header
    always = make_tokenizer(ignores.chat_template + "<|im_start|>assistant\n")
    check_headers(always, [make_row()], style, needs)


@pytest.mark.parametrize("args", [{"tokenize": True}, {"add_generation_prompt": False}])
def test_template_arguments_that_are_not_the_users_are_a_sentence(
    args: dict[str, Any], tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=r"TypeError.*data\.prompts\.chat_template_args"):
        render(tokenizer, ASKED, args)
