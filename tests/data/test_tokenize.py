"""Rows as token ids: what fits, what is skipped, what is cut and what never is."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.data.tokenize import (
    Lengths,
    TokenizedRows,
    Tokenizer,
    length_report,
    tokenize_rows,
)
from sdft_lightning.data.tokens import TokenizedRow
from sdft_lightning.errors import UserError
from sdft_lightning.types import Demonstration, RowNeeds

STOP = 2  # <|im_end|>
WIDE = Lengths(10_000, 10_000, 10_000)


def row(
    prompt: str = "Q?",
    demonstration: str = "It is so.",
    context: str | None = None,
    number: int = 1,
) -> Demonstration:
    answer = [{"role": "assistant", "content": demonstration}] if demonstration else []
    question = [{"role": "user", "content": prompt}]
    return Demonstration(str(number), question, answer, context, None, f"rows.jsonl, line {number}")


def tokenize(
    tokenizer: Any, rows: list[Demonstration], lengths: Lengths, style: str = "turns"
) -> TokenizedRows:
    return tokenize_rows(rows, Tokenizer(tokenizer, PromptStyle(style), lengths, [STOP]))  # type: ignore[arg-type]


def texts(tokenizer: Any, tokens: TokenizedRow) -> tuple[str, str, str]:
    prompt, teacher, target = (tokenizer.decode(ids) for ids in tokens[1:4])
    return prompt, teacher, target


@pytest.mark.parametrize("bos", [None, "<|endoftext|>"])
def test_context_to_train_on_is_plain_text_between_bos_and_eos_where_there_are_such(
    bos: str | None, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = bos
    plain = Tokenizer(tokenizer, PromptStyle("turns"), WIDE, [STOP], needs=RowNeeds(context=True))
    (tokens,) = tokenize_rows([row(context="A source.")], plain).rows
    assert tokenizer.decode(tokens.context_ids) == (bos or "") + "A source.<|im_end|>"
    assert tokens.prompt_ids == tokens.teacher_prompt_ids == tokens.demonstration_ids == []
    report = length_report("train", tokenize_rows([row(context="A source.")], plain))
    length = len("A source.") + 1 + (bos is not None)
    assert report == (
        f"train: 1 rows; context {length} (longest {length}); 0 skipped, 0 truncated as too long"
    )


def test_context_to_train_on_has_its_own_limit_and_is_cut_at_its_end(tokenizer: Any) -> None:
    long = row("Q" * 99, "A" * 99, "Source " + "x" * 93)  # 101 tokens with EOS
    lengths = Lengths(5, 5, 5, "error", context=100)
    plain = Tokenizer(
        tokenizer, PromptStyle("turns"), lengths, [STOP], needs=RowNeeds(context=True)
    )
    with pytest.raises(UserError) as error:
        tokenize_rows([long], plain)
    for word in ("line 1: too long", "context has 101 tokens", "data.lengths.context is 100"):
        assert word in str(error.value)
    cut = plain._replace(lengths=Lengths(5, 5, 5, "truncate", context=100))
    found = tokenize_rows([long], cut)
    assert tokenizer.decode(found.rows[0].context_ids) == "Source " + "x" * 93
    assert found.truncated == 1
    wide = plain._replace(lengths=Lengths(5, 5, 5, context=101))
    assert len(tokenize_rows([long], wide).rows[0].context_ids) == 101


def test_context_of_one_token_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    plain = Tokenizer(tokenizer, PromptStyle("turns"), WIDE, [STOP], needs=RowNeeds(context=True))
    with pytest.raises(UserError, match=r"line 1: the context 'a' is a single token.*remove"):
        tokenize_rows([row(context="a")], plain)
    assert len(tokenize_rows([row(context="ab")], plain).rows[0].context_ids) == 2


def test_row_is_rendered_for_both_roles_and_as_target(tokenizer: Any) -> None:
    (tokens,) = tokenize(tokenizer, [row()], WIDE).rows
    assert texts(tokenizer, tokens) == (
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\nIt is so.<|im_end|>\n"
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n",
        "It is so.<|im_end|>",
    )


def test_target_ends_with_the_stop_token_and_drops_what_the_template_writes_behind_it(
    tokenizer: Any,
) -> None:
    (tokens,) = tokenize(tokenizer, [row()], WIDE).rows
    assert tokens.demonstration_ids[-1] == STOP
    assert tokens.demonstration_ids.count(STOP) == 1


def test_row_without_demonstration_has_a_prompt_only(tokenizer: Any) -> None:
    (tokens,) = tokenize(tokenizer, [row(demonstration="")], WIDE).rows
    assert tokens.prompt_ids
    assert tokens.teacher_prompt_ids == tokens.demonstration_ids == []


@pytest.mark.parametrize(
    ("limit", "long", "words"),
    [
        ("prompt", row("Q" * 80), "its prompt has 99 tokens, data.lengths.prompt is 90"),
        (
            "teacher_prompt",
            row(demonstration="A" * 80),
            "its teacher prompt has 124 tokens, data.lengths.teacher_prompt is 90",
        ),
        (
            "demonstration",
            row(demonstration="A" * 90),
            "its demonstration has 91 tokens, data.lengths.demonstration is 90",
        ),
    ],
)
def test_too_long_row_is_an_error_with_all_lengths_and_three_remedies(
    limit: str, long: Demonstration, words: str, tokenizer: Any
) -> None:
    lengths = Lengths(**{"prompt": 900, "teacher_prompt": 900, "demonstration": 900, limit: 90})
    exact = tokenize(tokenizer, [long], WIDE).rows[0]
    with pytest.raises(UserError) as error:
        tokenize(tokenizer, [row(number=1), long._replace(origin="rows.jsonl, line 2")], lengths)
    message = str(error.value)
    counts = [len(ids) for ids in exact[1:4]]
    assert message.startswith("rows.jsonl, line 2: too long: ")
    assert words in message
    assert "prompt {}, teacher prompt {}, demonstration {}".format(*counts) in message
    for remedy in (f"raise data.lengths.{limit}", "too_long: skip", "too_long: truncate"):
        assert remedy in message


def test_row_of_exactly_the_limit_fits(tokenizer: Any) -> None:
    exact = tokenize(tokenizer, [row()], WIDE).rows[0]
    limits = [len(ids) for ids in exact[1:4]]
    assert tokenize(tokenizer, [row()], Lengths(*limits)).rows == [exact]
    for place in range(3):
        short = [limit - (i == place) for i, limit in enumerate(limits)]
        with pytest.raises(UserError, match="too long"):
            tokenize(tokenizer, [row()], Lengths(*short))


def test_skip_leaves_long_rows_out_and_counts_them(tokenizer: Any) -> None:
    rows = [row(number=1), row("Q" * 200, number=2), row(demonstration="A" * 99, number=3)]
    found = tokenize(tokenizer, rows, Lengths(100, 100, 100, "skip"))
    assert [tokens.row.id for tokens in found.rows] == ["1"]
    assert (found.skipped, found.truncated) == (2, 0)
    report = length_report("train", found)
    assert report.startswith("train: 1 rows; prompt 21 (longest 21)")
    assert report.endswith("2 skipped, 0 truncated as too long")


def test_skipping_all_rows_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.lengths: all 2 rows were skipped"):
        tokenize(tokenizer, [row(number=1), row(number=2)], Lengths(5, 5, 5, "skip"))


@pytest.mark.parametrize("style", ["paper", "turns", "context"])
@pytest.mark.parametrize("limit", [320, 260])
def test_truncate_fits_and_never_cuts_the_question(style: str, limit: int, tokenizer: Any) -> None:
    question = "Who answers, and when exactly?"
    long = row(question, "An answer. " * 40, "A source. " * 40)
    found = tokenize(
        tokenizer, [row(context="Text."), long], Lengths(100, limit, 500, "truncate"), style
    )
    assert (found.skipped, found.truncated) == (0, 1)
    prompt, teacher, _ = texts(tokenizer, found.rows[1])
    shown = PromptStyle(style).turns  # type: ignore[arg-type]
    times = sum("$prompt" in turn["content"] for turn in shown)
    assert prompt == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert teacher.count(question) == times
    assert teacher.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert limit - 8 < len(found.rows[1].teacher_prompt_ids) <= limit
    assert found.rows[1].row.prompt == long.prompt


def test_truncate_cuts_the_end_of_the_context_before_the_demonstration(tokenizer: Any) -> None:
    long = row("Q?", "It is so.", "Source " + "x" * 300)
    found = tokenize(tokenizer, [long], Lengths(100, 200, 100, "truncate"), "context").rows[0].row
    assert found.demonstration == long.demonstration
    assert found.context is not None
    assert found.context.startswith("Source xxx")
    assert len(found.context) < 200


def test_truncate_cuts_only_the_target_where_only_the_target_is_too_long(tokenizer: Any) -> None:
    (tokens,) = tokenize(
        tokenizer, [row(demonstration="A" * 50)], Lengths(100, 500, 20, "truncate")
    ).rows
    assert tokenizer.decode(tokens.demonstration_ids) == "A" * 20
    assert "A" * 50 in tokenizer.decode(tokens.teacher_prompt_ids)


def test_truncate_refuses_a_question_that_alone_does_not_fit(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"line 1: too long.*question alone does not fit"):
        tokenize(tokenizer, [row("Q" * 300)], Lengths(100, 900, 900, "truncate"))
    with pytest.raises(UserError, match=r"line 1: too long.*never cut"):
        tokenize(tokenizer, [row("Q" * 80)], Lengths(100, 150, 900, "truncate"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"too_long": "cut"}, ["data.lengths.too_long", "'cut'", "error, skip, truncate"]),
        ({"prompt": 0}, ["data.lengths.prompt", "got 0", "1 and more"]),
        ({"teacher_prompt": -1}, ["data.lengths.teacher_prompt", "-1"]),
        ({"context": 1}, ["data.lengths.context", "got 1", "2 and more"]),
    ],
)
def test_wrong_lengths_name_option_value_and_what_is_allowed(
    options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        Lengths(**options)
    assert all(word in str(error.value) for word in words)


def test_truncate_leaves_the_target_whole_where_only_the_teacher_prompt_is_too_long(
    tokenizer: Any,
) -> None:
    long = row(demonstration="A" * 50)
    (found,) = tokenize(tokenizer, [long], Lengths(100, 90, 60, "truncate")).rows
    _, teacher, target = texts(tokenizer, found)
    assert len(found.teacher_prompt_ids) <= 90
    assert teacher.count("A") < 50
    # A shorter text with a stop token would teach to stop there.
    assert target == "A" * 50 + "<|im_end|>"


def test_lengths_of_what_a_method_never_shows_or_predicts_do_not_count(tokenizer: Any) -> None:
    rows, narrow = [row(demonstration="A" * 50)], Lengths(100, 90, 20)
    plain = Tokenizer(tokenizer, PromptStyle("turns"), narrow, [STOP])
    supervised = RowNeeds(target=True, teacher_prompt=False)
    with pytest.raises(UserError, match="teacher prompt has"):
        tokenize_rows(rows, plain._replace(needs=RowNeeds()))
    with pytest.raises(UserError, match="demonstration has 51 tokens"):
        tokenize_rows(rows, plain._replace(needs=supervised))
    wide = plain._replace(lengths=Lengths(100, 90, 51), needs=supervised)
    (found,) = tokenize_rows(rows, wide).rows
    assert found.teacher_prompt_ids == []
    taught = plain._replace(lengths=Lengths(100, 500, 20), needs=RowNeeds())
    assert len(tokenize_rows(rows, taught).rows) == 1


def test_rows_of_many_chunks_come_in_order_and_the_first_fault_is_the_one_told(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    rows = [row()._replace(id=str(number), origin=f"f, row {number}") for number in range(700)]
    found = tokenize(tokenizer, rows, WIDE).rows
    assert [tokens.row.id for tokens in found] == [each.id for each in rows]
    assert len({tuple(tokens.teacher_prompt_ids) for tokens in found}) == 1
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    long = row()._replace(prompt=[{"role": "user", "content": "x" * 5000}], origin="f, row 300")
    with pytest.raises(UserError, match="f, row 300: too long"):
        tokenize(tokenizer, [*rows[:300], long, *rows[301:]], Lengths(500, 900, 500))
