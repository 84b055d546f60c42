"""Which letter a completion settles on."""

import json
import os
import time
from pathlib import Path

import pytest

from sdft_lightning.graders import get_grader, gold_self_test
from sdft_lightning.graders.choice import chosen_letter, reference_letter

DATA = Path(os.environ.get("SDFT_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared/data"))
SCIENCE = DATA / "demonstrations" / "science"


@pytest.mark.parametrize(
    "text", ["B", "B.", "(B)", "B)", "[B]", " B \n", "**B**", "**(B).**", "`B`"]
)
def test_a_bare_letter_counts_with_or_without_marks(text: str) -> None:
    assert chosen_letter(text) == "B"


@pytest.mark.parametrize("text", ["b", "(b)", "b.", "Answer: b", "The answer is (b).", "\uff22"])
def test_a_small_or_full_width_letter_counts_where_it_cannot_be_a_word(text: str) -> None:
    assert chosen_letter(text) == "B"


@pytest.mark.parametrize("text", ["B. water", "(B) water", "B) water", "B: water", "B - water"])
def test_a_label_before_the_text_of_its_option_counts(text: str) -> None:
    assert chosen_letter(text) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "The correct answer is C.",
        "Answer: (C)",
        "**Answer:** C",
        "Final answer - C",
        "Answer:\n\nC",
        "The answer to this question is therefore **C**, not B.",
        "The best choice would be option C because A is too small.",
        "I would choose C.",
        "Option (C) is the correct answer.",
        "So it is $\\boxed{\\text{C}}$.",
        "A: CC\nB: CO\nC: CN\nAnswer: C",
    ],
)
def test_a_clear_statement_counts(text: str) -> None:
    assert chosen_letter(text) == "C"


def test_the_last_of_several_statements_counts() -> None:
    assert chosen_letter("The answer is A. Wait, the correct answer is B.") == "B"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>B</answer>", "B"),
        ("<reasoning>\nA or B\n</reasoning>\n<answer>\nA\n</answer>", "A"),
        ("<answer>A</answer> or rather <answer>C</answer>", "C"),
        ("<answer>**B**</answer>", "B"),
        ("<ANSWER> d </ANSWER>", "D"),
        ("<answer>C: CCOC(=O)CC</answer>", "C"),
        ("<answer>B", "B"),
    ],
)
def test_the_last_answer_tag_counts(text: str, letter: str) -> None:
    assert chosen_letter(text) == letter


@pytest.mark.parametrize("inside", ["", "A or B", "A, B", "A molecule", "none"])
def test_an_unreadable_answer_tag_is_not_replaced_by_an_earlier_statement(inside: str) -> None:
    assert chosen_letter(f"The correct answer is A. <answer>{inside}</answer>") is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<think>The answer is A.</think>\nB", "B"),
        ("maybe (A)</think>\n\nThe answer is C", "C"),  # the template held the opening tag
        ("<think>The answer is A", None),
        ("<reasoning>The answer is A</reasoning>\nB", "B"),
        ("<THINK>(A)</Think>B", "B"),
        ("<think>(A)</reasoning>(C)</think>B", "B"),
        ("<think><reasoning>(A)</reasoning>B", None),
        ("<think>(A)<think>(C)</think>B", "B"),
    ],
)
def test_a_letter_in_a_thought_is_not_an_answer(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    "text",
    [
        "A molecule has atoms.",
        "**A molecule**",
        "The answer is A molecule with two rings.",
        "The answer is a molecule.",
        "Answer: A molecule",
        "I think so.",
        "The answer is I think unclear.",
    ],
)
def test_the_words_a_and_i_are_not_letters(text: str) -> None:
    assert chosen_letter(text) is None


@pytest.mark.parametrize("text", ["A", "The answer is A", "A because it boils", "Answer: A) water"])
def test_the_letter_a_is_still_found_where_no_noun_follows(text: str) -> None:
    assert chosen_letter(text) == "A"


@pytest.mark.parametrize(
    "text",
    [
        "A or B",
        "A\nB",
        "A. B. C.",
        "(A) and (B)",
        "A. water\nB. ice\nC. steam",
        "Both B and C are plausible.",
        "The answer is A or B.",
        "The answer is B, C and D.",
        "Answer: A/B",
        "Option A fits, option B too.",
        "Option A or option B",
        "I waver between option A and (B)",
    ],
)
def test_several_letters_without_a_statement_are_no_answer(text: str) -> None:
    assert chosen_letter(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "The wrong answer is B.",
        "The answer is not A.",
        "I don't pick B.",
        "Option A is wrong.",
        "Neither A nor B is correct.",
    ],
)
def test_a_rejected_letter_is_no_answer(text: str) -> None:
    assert chosen_letter(text) is None


def test_an_opening_label_stands_although_another_option_is_called_wrong() -> None:
    assert chosen_letter("**B. Water**\n\nOption A is incorrect because it is dry.") == "B"


@pytest.mark.parametrize(
    "text", ["The answer is C-C bond cleavage.", "C=O stretches", "(E)-stilbene", "CC(C)O"]
)
def test_a_chemical_formula_is_not_a_letter(text: str) -> None:
    assert chosen_letter(text) is None


@pytest.mark.parametrize("text", ["", " \n", "\u7b54\u6848", "((((", "<answer>", "\\boxed{}"])
def test_text_without_a_letter_scores_zero(text: str) -> None:
    assert get_grader("choice")(text, "A") == 0.0


@pytest.mark.parametrize("mark", ["(", "\n", " ", "'", "A ", "B. ", "<answer>", "**", "answer is "])
def test_a_degenerate_completion_is_read_without_error(mark: str) -> None:
    assert get_grader("choice")(mark * 2000, "D") == 0.0


@pytest.mark.parametrize("before", ["", "answer", "The answer is", "A", "**A. ", "<answer"])
@pytest.mark.parametrize(
    "mark", ["<think></think", "<think>", "<reasoning>", " ", "\n", "(", "[", "1", "A ", "A\n"]
)
def test_a_completion_that_repeats_itself_is_graded_within_a_second(before: str, mark: str) -> None:
    text = before + mark * (56_000 // len(mark) if "think" in mark else 20_000 // len(mark))
    taken = []
    for _ in range(2):  # the lesser: Python may collect what other tests have left behind
        start = time.process_time()
        assert get_grader("choice")(text, "D") == 0.0
        taken.append(time.process_time() - start)
    assert min(taken) < 1


@pytest.mark.parametrize("reference", ["B", " B ", "B.", "(B)", "B. water", "B) water", "B: CCO"])
def test_the_reference_may_carry_its_option(reference: str) -> None:
    assert reference_letter(reference) == "B"


@pytest.mark.parametrize("reference", [None, "", "b", "AB", "A molecule", "water", 1, ["A"]])
def test_another_reference_is_an_error_and_not_a_zero(reference: object) -> None:
    with pytest.raises(ValueError, match="capital letter A to Z"):
        get_grader("choice")("A", reference)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_science_demonstration_passes(split: str) -> None:
    path = SCIENCE / f"{split}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here; set SDFT_SHARED_DATA to the folder of the shared data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [row["messages"][-1]["content"] for row in rows]
    result = gold_self_test("choice", [row["_answer"] for row in rows], texts)
    assert result == (len(rows), len(rows), [])


def test_the_paper_format_passes_on_all_507_items_and_fails_with_the_next_letter() -> None:
    path = SCIENCE / "test_507.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here; set SDFT_SHARED_DATA to the folder of the shared data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    letters = [row["answer"] for row in rows]
    wrong = [{"A": "B", "B": "C", "C": "D", "D": "A"}[letter] for letter in letters]
    form = "<reasoning>\n{question}\n</reasoning>\n<answer>\n{letter}\n</answer>\n"
    questions = [row["prompt"][-1]["content"] for row in rows]
    for answers, passed in ((letters, 507), (wrong, 0)):
        texts = [
            form.format(question=question, letter=letter)
            for question, letter in zip(questions, answers, strict=True)
        ]
        assert gold_self_test("choice", letters, texts).passed == passed
