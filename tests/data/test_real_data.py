"""All files of real demonstrations load with a few lines of config each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sdft_lightning.data import Columns, DemonstrationDataModule
from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.data.tokenize import Lengths
from sdft_lightning.data.tokens import TokenizedRow
from sdft_lightning.graders import get_grader
from sdft_lightning.graders.tool_call import render_calls

WIDE = Lengths(10**6, 10**6, 10**6)


class Real(NamedTuple):
    """A file, the split that it is used as, its columns and grader, and how many rows it has."""

    file: str
    split: str
    columns: Columns
    grader: str | None
    rows: int


SCIENCE = Columns(demonstration="messages", reference="_answer")
SYSTEM = Columns(reference="answer")
TOOLS = Columns(demonstration="golden_response", reference="golden_answer")
MEDICAL = Columns(demonstration="messages")

FILES = [
    Real("science/train.jsonl", "train", SCIENCE, "choice", 1200),
    Real("science/validation.jsonl", "validation", SCIENCE, "choice", 94),
    Real("science/test.jsonl", "test", SCIENCE, "choice", 425),
    Real("science/test_507.jsonl", "test", SYSTEM, "choice", 507),
    Real("tooluse/train_real114.jsonl", "train", TOOLS, "tool_call_released", 114),
    Real("tooluse/train_toolalpaca20.jsonl", "train", TOOLS, "tool_call_released", 20),
    Real("tooluse/test_paper68.jsonl", "test", TOOLS, "tool_call_released", 68),
    Real("tooluse/test_97.jsonl", "test", TOOLS, "tool_call_released", 97),
    Real("medical/train.jsonl", "train", MEDICAL, None, 400),
    Real("medical/validation.jsonl", "validation", MEDICAL, None, 300),
    Real("medical/test.jsonl", "test", MEDICAL, None, 300),
]


@pytest.fixture
def load(model_folder: Path, shared_data: Path) -> Any:
    """Load a file by its name and return its tokenized rows."""

    def tokenized(real: Real) -> list[TokenizedRow]:
        path = str(shared_data / "demonstrations" / real.file)
        splits = {real.split: path}
        if real.split == "train" and real.grader is not None:
            splits["validation"] = path  # so that its references are checked, too
        data = DemonstrationDataModule(
            str(model_folder),
            **splits,  # type: ignore[arg-type]
            columns=real.columns,
            grader=real.grader,
            prompts=PromptStyle("turns"),
            lengths=WIDE,
        )
        data.setup({"train": "fit", "validation": "validate", "test": "test"}[real.split])
        return list(data._sets[real.split].rows)

    return tokenized


@pytest.mark.parametrize("real", FILES, ids=lambda real: real.file)
def test_all_rows_load_with_a_prompt_and_the_demonstrations_and_references_there_are(
    real: Real, load: Any
) -> None:
    rows = load(real)
    assert len(rows) == real.rows
    taught = [row for row in rows if row.row.demonstration]
    has_none = real.file in {
        "science/test_507.jsonl",
        "tooluse/test_paper68.jsonl",
        "tooluse/test_97.jsonl",
    }
    assert len(taught) == (0 if has_none else real.rows)
    for tokens in taught:
        assert len(tokens.teacher_prompt_ids) > len(tokens.prompt_ids) + len(
            tokens.demonstration_ids
        )
        assert tokens.demonstration_ids[-1] == 2
    if real.grader is not None:
        assert all(row.row.reference is not None for row in rows)


def texts(tokenizer: Any, tokens: TokenizedRow) -> tuple[str, str, str]:
    prompt, teacher, target = (tokenizer.decode(ids) for ids in tokens[1:4])
    return prompt, teacher, target


def user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n"


ASSISTANT = "<|im_start|>assistant\n"


def test_science_conversation_is_shown_as_an_earlier_turn_without_its_own_prompt(
    load: Any, tokenizer: Any
) -> None:
    row = load(FILES[1])[0]
    question = row.row.prompt[0]["content"]
    prompt, teacher, target = texts(tokenizer, row)
    assert question.startswith("Given a question and four options, please select")
    assert question.endswith("A. 2.6\nB. 1.65\nC. 3.37\nD. -0.42")
    assert prompt == user(question) + ASSISTANT
    answer = "The correct answer is A."
    shown = f"{ASSISTANT}{answer}<|im_end|>\n"
    assert teacher == user(question) + shown + user(question) + ASSISTANT
    assert target == f"{answer}<|im_end|>"
    assert get_grader("choice")(answer, row.row.reference) == 1.0


def test_system_turn_of_the_authors_science_set_stays_in_the_prompt(
    load: Any, tokenizer: Any
) -> None:
    row = load(FILES[3])[0]
    prompt = texts(tokenizer, row)[0]
    assert prompt.startswith("<|im_start|>system\n\nGiven a question and four options")
    assert "<answer>\nA\n</answer>\n<|im_end|>\n<|im_start|>user\nWhich of the following" in prompt
    assert row.row.reference == "A"
    assert row.teacher_prompt_ids == row.demonstration_ids == []


def test_steps_of_a_tool_use_demonstration_are_joined_with_newlines(
    load: Any, tokenizer: Any
) -> None:
    row = load(FILES[4])[0]
    prompt, teacher, target = texts(tokenizer, row)
    question = row.row.prompt[0]["content"]
    assert prompt == user(question) + ASSISTANT
    assert "Name: Nager.Date\nDescription: Public holidays" in prompt
    assert target == render_calls(row.row.reference) + "<|im_end|>"
    assert teacher == user(question) + ASSISTANT + target + "\n" + user(question) + ASSISTANT


def test_thoughts_of_toolalpaca_stand_before_their_calls(load: Any, tokenizer: Any) -> None:
    target = texts(tokenizer, load(FILES[5])[0])[2]
    before, _, after = target.partition("Action:")
    assert before.strip()
    assert "Action Input:" in after
    assert target.endswith("<|im_end|>")


def test_tool_use_test_set_has_the_question_only(load: Any, tokenizer: Any) -> None:
    rows = load(FILES[7])
    assert (
        "Name: Axolotl\nDescription: Collection of axolotl pictures" in texts(tokenizer, rows[0])[0]
    )
    scores = [
        get_grader("tool_call_released")(render_calls(row.row.reference), row.row.reference)
        for row in rows
    ]
    assert sum(scores) == 95  # the released grader's own gold self-test, METHOD §4


def test_medical_conversation_is_a_long_target(load: Any, tokenizer: Any) -> None:
    row = load(FILES[9])[0]
    prompt, _, target = texts(tokenizer, row)
    assert prompt == user(row.row.prompt[0]["content"]) + ASSISTANT
    assert target.startswith("In pleural effusion fluid associated with rheumatoid arthritis")
    assert target.endswith("B. High glucose<|im_end|>")
