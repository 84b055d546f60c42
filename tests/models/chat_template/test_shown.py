"""What a chat template drops is noticed, and nothing else is taken for dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.data.tokenize import Lengths, Tokenizer
from sdft_lightning.errors import UserError
from sdft_lightning.models.chat_template import first_missing
from sdft_lightning.types import Demonstration, RowNeeds

THOUGHT = "<think>BECAUSE</think>So: 4."
TALK = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "What is 1+1?")]
WIDE = Lengths(10_000, 10_000, 10_000)


def tokenize(tokenizer: Any, row: Demonstration, style: Any = "turns", **needs: Any) -> Any:
    by = Tokenizer(tokenizer, PromptStyle(style), WIDE, [2], RowNeeds(**needs))
    return by(row)


@pytest.mark.parametrize("style", ["turns", "context", "paper"])
def test_system_turn_that_the_template_drops_is_named_with_its_row(
    style: str, with_template: Callable[[str], Any], make_row: Callable[..., Any]
) -> None:
    row = make_row([("system", "Be brief."), ("user", "Q?")])
    with pytest.raises(UserError) as error:
        tokenize(with_template("drops_system"), row, style)
    for word in ("a.jsonl, row 7", "the system turn", "'Be brief.'", "student's", "take it out"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["drops_thinking", "qwen3_like", "r1_like"])
@pytest.mark.parametrize("style", ["turns", "context"])
def test_reasoning_that_the_template_hides_from_the_teacher_is_an_error_with_the_remedy(
    name: str, style: str, with_template: Callable[[str], Any], make_row: Callable[..., Any]
) -> None:
    tokenizer = with_template(name)
    row = make_row(demonstration=THOUGHT)
    with pytest.raises(UserError) as error:
        tokenize(tokenizer, row, style)
    message = str(error.value)
    assert message.startswith("a.jsonl, row 7: ")
    for word in ("the demonstration", "teacher's", "'BECAUSE'", "paper", "chat_template_args"):
        assert word in message
    shown = tokenize(tokenizer, row, "paper")  # the remedy
    assert "BECAUSE" in tokenizer.decode(shown.teacher_prompt_ids)
    tokenize(tokenizer, row, style, teacher_prompt=False)  # a method without a teacher


def test_earlier_thoughts_and_questions_that_are_dropped_are_noticed_for_both_roles(
    make_tokenizer: Callable[..., Any],
    with_template: Callable[[str], Any],
    make_row: Callable[..., Any],
) -> None:
    talk = make_row([("user", "Hi"), ("assistant", THOUGHT), ("user", "Q?")])
    with pytest.raises(UserError, match=r"a turn of the assistant.*student's.*'BECAUSE'"):
        tokenize(with_template("qwen3_like"), talk)
    last = make_tokenizer("{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}")
    with pytest.raises(UserError, match=r"the question out of the teacher's"):
        tokenize(last, make_row())
    twice = make_tokenizer(  # only the last of the two equal questions
        "{% for m in messages %}{% if m.role != 'user' or loop.last %}{{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    with pytest.raises(UserError, match=r"the question out of the teacher's"):
        tokenize(twice, make_row())
    cut = make_tokenizer("{% for m in messages %}{{ m.content | truncate(12) }}{% endfor %}:")
    with pytest.raises(UserError, match=r"the question out of the student's"):
        tokenize(cut, make_row("What is it that you want to know?"))
    cut_context = make_tokenizer("{% for m in messages %}{{ m.content[9:] }}{% endfor %}:")
    with pytest.raises(UserError, match="out of the"):
        tokenize(cut_context, make_row(context="Sums. " * 9), "context")


TEMPLATES = sorted(path.stem for path in (Path(__file__).parent / "templates").glob("*.jinja"))
CONTENTS = [
    "What is <b> & \"1\" + 1 > 'x'?",
    "  \n blanks  before and behind \t\n\n",
    "a\n\n\n  b\r\n\tc",
    "ünï – 漢字 😀",
    '{"name": "f", "arguments": {"x": [1, "é"]}}',
    "</p> &amp; &lt;",
    "4",
    "user",
    "C:\\new\\table /think /no_think",
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("style", ["paper", "turns", "context"])
def test_nothing_is_taken_for_dropped_where_everything_is_shown(
    name: str, style: str, with_template: Callable[[str], Any], make_row: Callable[..., Any]
) -> None:
    tokenizer = with_template(name)
    for text in CONTENTS:
        tokenize(tokenizer, make_row(text, text, context=text), style)
        tokenize(tokenizer, make_row(text, "It is so. " + text, context="The " + text), style)
    if name not in ("drops_system", "blank_before_answer", "gemma2_like"):
        tokenize(tokenizer, make_row(TALK), style)
    if name not in ("drops_thinking", "qwen3_like", "r1_like") or style == "paper":
        tokenize(tokenizer, make_row(demonstration=THOUGHT), style)


@pytest.mark.parametrize("name", ["qwen3_like", "llama3_like", "gemma3_like", "escapes_html"])
def test_tool_turns_in_a_demonstration_are_shown(
    name: str, with_template: Callable[[str], Any], make_row: Callable[..., Any]
) -> None:
    call = [("assistant", "call()"), ("tool", '{"x": "a\nb é"}'), ("assistant", "It is 2.")]
    tokenize(with_template(name), make_row(demonstration=call), target=False)


def test_a_model_without_a_system_turn_that_refuses_it_says_so(
    with_template: Callable[[str], Any], make_row: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match=r"^a\.jsonl, row 7: .*roles system, .*not supported"):
        tokenize(with_template("gemma2_like"), make_row(TALK))


@pytest.mark.parametrize("key", ["validation", "test", "predict"])
def test_dropped_turn_is_noticed_in_every_set(
    key: str,
    with_template: Callable[[str], Any],
    model_folder: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
) -> None:
    import shutil

    from sdft_lightning.data import Columns, DemonstrationDataModule

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = with_template("drops_system")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|im_end|>")
    tokenizer.save_pretrained(folder)
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"prompt": "Q?", "reference": "1"},
        {"prompt": [system, {"role": "user", "content": "Q?"}], "reference": "1"},
    ]
    data = DemonstrationDataModule(
        str(folder),
        grader="exact",
        columns=Columns(reference="reference"),
        **{key: str(write_rows(rows))},
    )
    stage = {"validation": "validate"}.get(key, key)
    with pytest.raises(UserError, match=r"line 2: .*the system turn.*'Be brief\.'"):
        data.setup(stage)


def test_count_is_of_all_turns_in_one_rendering() -> None:
    messages = [{"role": "user", "content": "aa"}, {"role": "user", "content": "a a"}]
    assert first_missing(messages, "aa;a a") is None
    assert first_missing(messages, "aa") is not None
    assert first_missing([{"role": "user", "content": "   "}], "") is None
