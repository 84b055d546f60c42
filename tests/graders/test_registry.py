"""Graders by name, and the check of references before training."""

import pytest

from sdft_lightning.graders import GRADERS, check_reference, get_grader, gold_self_test

RIGHT = {
    "contains": ["Paris", "paris, france"],
    "exact": "Paris",
    "choice": "B. water",
    "token_f1": "Watch and wait.",
    "tool_call": [{"Action": "a", "Action_Input": "{malformed"}],
    "tool_call_released": [{"Action": "a", "Action_Input": "{malformed"}],
}


def test_every_grader_has_a_reference_form() -> None:
    assert set(GRADERS) == set(RIGHT)
    for name in GRADERS:
        assert get_grader(name) is GRADERS[name]


@pytest.mark.parametrize("name", ["", "judge", "Contains", None])
def test_an_unknown_name_names_the_option_the_values_and_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match="grader must be one of choice, contains, exact") as caught:
        get_grader(name)
    assert f"got {name!r}" in str(caught.value)
    assert "Correct the option `grader`" in str(caught.value)
    with pytest.raises(ValueError, match="grader must be one of"):
        check_reference(name, "x", "train.jsonl, row 0")


@pytest.mark.parametrize("name", list(RIGHT))
def test_a_reference_of_the_right_form_passes(name: str) -> None:
    check_reference(name, RIGHT[name], "train.jsonl, row 0")


@pytest.mark.parametrize("name", list(RIGHT))
@pytest.mark.parametrize("reference", [None, 3, "", []])
def test_a_wrong_reference_is_reported_with_its_row(name: str, reference: object) -> None:
    with pytest.raises(ValueError, match=r"^train\.jsonl, row 12: grader ") as caught:
        check_reference(name, reference, "train.jsonl, row 12")
    assert name in str(caught.value)
    assert f"got {reference!r}" in str(caught.value) or f"text {reference!r}" in str(caught.value)


def test_a_grader_of_the_users_own_is_found_and_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(GRADERS, "length", lambda text, reference: float(len(text) == reference))
    check_reference("length", 3, "train.jsonl, row 0")
    assert get_grader("length")("abc", 3) == 1.0


def test_gold_self_test_counts_and_names_the_failing_rows() -> None:
    result = gold_self_test("contains", ["7", "7", "7"], ["17", "it is 7", ""])
    assert result == (1, 3, [0, 2])
    assert (result.passed, result.total, result.failing) == (1, 3, [0, 2])


def test_gold_self_test_of_nothing_is_empty() -> None:
    assert gold_self_test("exact", [], []) == (0, 0, [])


def test_gold_self_test_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        gold_self_test("exact", ["a", "b"], ["a"])
