"""Graders by name, and the check of references before training."""

from pathlib import Path

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


def test_a_dotted_path_is_imported_and_graded_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_graders.py").write_text(
        "half = 0.5\n\n\ndef length(text, reference):\n    return float(len(text) == reference)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert get_grader("my_graders.length")("abc", 3) == 1.0
    assert gold_self_test("my_graders.length", [3, 4], ["abc", "abc"]).failing == [1]
    check_reference("my_graders.length", 3, "train.jsonl, row 0")
    for name, words in (
        ("my_graders.none", "cannot be imported: module 'my_graders' has no attribute 'none'"),
        ("not_there.length", "cannot be imported: No module named 'not_there'"),
        ("my_graders.half", "is a float, and no function"),
        ("my graders.length", "grader must be one of"),
        (".length", "grader must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            get_grader(name)


def test_gold_self_test_counts_and_names_the_failing_rows() -> None:
    result = gold_self_test("contains", ["7", "7", "7"], ["17", "it is 7", ""])
    assert result == (1, 3, [0, 2])
    assert (result.passed, result.total, result.failing) == (1, 3, [0, 2])


def test_gold_self_test_of_nothing_is_empty() -> None:
    assert gold_self_test("exact", [], []) == (0, 0, [])


def test_gold_self_test_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        gold_self_test("exact", ["a", "b"], ["a"])
