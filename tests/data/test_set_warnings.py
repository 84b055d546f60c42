"""What is told of sets that are not as they seem."""

from __future__ import annotations

from typing import Any

import pytest

from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.data.rows import Columns
from sdft_lightning.data.sets import PlannedSet, set_warnings
from sdft_lightning.data.tokenize import Lengths, Tokenizer, tokenize_rows
from sdft_lightning.errors import UserError
from sdft_lightning.models.tokenization import load_tokenizer
from sdft_lightning.types import Demonstration, RowNeeds

STOP = 2  # <|im_end|>


def row(number: int, answer: str = "It is so.", question: str = "Q?") -> Demonstration:
    demonstration = [{"role": "assistant", "content": answer}] if answer else []
    prompt = [{"role": "user", "content": question}]
    return Demonstration(
        str(number), prompt, demonstration, None, None, f"rows.jsonl, line {number}"
    )


def told(
    tokenizer: Any, rows: list[Demonstration], key: str = "validation", grader: str | None = "exact"
) -> list[str]:
    planned = PlannedSet(key, "task", "rows.jsonl", Columns(), RowNeeds(), grader)
    lengths = Lengths(prompt=60, too_long="skip")
    by = Tokenizer(tokenizer, PromptStyle("turns"), lengths, [STOP])
    return set_warnings(planned, tokenize_rows(rows, by), len(rows), by)


def test_nothing_is_told_of_a_set_as_it_should_be(tokenizer: Any) -> None:
    assert told(tokenizer, [row(1), row(2)]) == []
    assert told(tokenizer, [row(1, ""), row(2, "")]) == []  # the teacher is not graded at all
    assert told(tokenizer, [row(1), row(2, question="Q" * 60)], "train", None) == []


def test_graded_rows_that_are_left_out_are_told_with_their_number(tokenizer: Any) -> None:
    (line,) = told(tokenizer, [row(1), row(2, question="Q" * 60), row(3)])
    assert line.startswith("data.validation: 1 of 3 rows are too long and left out")
    assert "accuracies are of the other 2" in line


def test_rows_in_which_the_teacher_is_not_graded_are_told(tokenizer: Any) -> None:
    (line,) = told(tokenizer, [row(1), row(2, ""), row(3)], "held_out.x")
    assert "1 of 3 rows have no demonstration: the teacher's accuracy is of the other 2" in line


def test_stop_token_inside_a_demonstration_is_told_with_the_first_row(tokenizer: Any) -> None:
    rows = [row(1), row(2, "So.<|im_end|>\nNot so."), row(3, "<|im_end|>.")]
    (line,) = told(tokenizer, rows, "train", None)
    assert line.startswith("rows.jsonl, line 2: the demonstration has a token in its text")
    assert "(<|im_end|>), as 2 of 3 rows have" in line


def test_tokenizer_without_end_of_sequence_is_refused(make_tokenizer: Any, tmp_path: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", None
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "model"))
