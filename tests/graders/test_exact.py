"""When a completion is the answer and nothing else."""

import pytest

from sdft_lightning.graders import get_grader

exact = get_grader("exact")


@pytest.mark.parametrize("text", ["Paris", " paris.\n", "PARIS", "Paris ."])
def test_case_white_space_and_one_full_stop_do_not_count(text: str) -> None:
    assert exact(text, "Paris") == 1.0
    assert exact("Paris", text) == 1.0


@pytest.mark.parametrize(
    "text", ["", ".", "Paris, France", "Paris...", "**Paris**", "It is Paris."]
)
def test_anything_more_or_less_is_not_exact(text: str) -> None:
    assert exact(text, "Paris") == 0.0


def test_inner_white_space_is_folded_and_not_removed() -> None:
    assert exact("New\n York", "new york") == 1.0
    assert exact("NewYork", "new york") == 0.0


def test_composed_and_decomposed_accents_are_the_same() -> None:
    assert exact("cafe\u0301", "caf\u00e9") == 1.0


def test_any_of_several_accepted_texts_is_enough() -> None:
    assert exact("48", ["forty-eight", "48"]) == 1.0
    assert exact("4", ["forty-eight", "48"]) == 0.0


@pytest.mark.parametrize("reference", [None, 48, "", ".", []])
def test_another_reference_is_an_error_and_not_a_zero(reference: object) -> None:
    with pytest.raises(ValueError, match="must be a text, or a list of accepted texts"):
        exact("", reference)
