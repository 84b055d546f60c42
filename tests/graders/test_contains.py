"""Where an answer stands in a text as a word of its own."""

import pytest

from sdft_lightning.graders import get_grader

contains = get_grader("contains")


@pytest.mark.parametrize(
    "text",
    [
        "480",
        "148",
        "1,480",
        "48.50",
        "48.0",
        "0.48",
        ".48",
        "48,000",
        "3:48",
        "48/50",
        "-48",
        "48th",
    ],
)
def test_a_number_inside_a_longer_number_is_not_a_match(text: str) -> None:
    assert contains(text, "48") == 0.0
    assert contains(f"It is {text}, I think.", "48") == 0.0


@pytest.mark.parametrize(
    "text",
    ["48", "$48.", "48 dollars", "48, or so", "48%", "(48)", "**48**", "_48_", "= 48\n", "48-hour"],
)
def test_a_number_with_a_sign_or_a_sentence_around_it_is_a_match(text: str) -> None:
    assert contains(text, "48") == 1.0


def test_a_longer_number_does_not_hide_a_later_match() -> None:
    assert contains("480 / 10 = 48", "48") == 1.0
    assert contains("17 and 7.5", "7") == 0.0


def test_a_list_marker_or_a_range_is_not_a_minus_sign() -> None:
    assert contains("- 48", "48") == 1.0
    assert contains("pages 40-48", "48") == 1.0
    assert contains("it is \u221248", "-48") == 1.0
    assert contains("pages 40-48", "-48") == 0.0


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("The capital is PARIS.", "paris", 1.0),
        ("a party", "art", 0.0),
        ("Paris's tower", "Paris", 1.0),
        ("call get_user now", "get", 0.0),
        ("_Paris_ and __Rome__", "Rome", 1.0),
        ("New\n  York\u00a0City", "new york city", 1.0),
        ("I like C++ most", "C++", 1.0),
        ("it costs US$48", "$48", 1.0),
    ],
)
def test_words_match_whole_and_in_any_case(text: str, reference: str, score: float) -> None:
    assert contains(text, reference) == score


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("au cafe\u0301", "caf\u00e9", 1.0),  # decomposed and composed
        ("au cafe\u0301", "cafe", 0.0),
        ("STRASSE", "stra\u00dfe", 1.0),
        ("don\u2019t", "don't", 1.0),
        ("10\u00b2 = 100", "102", 0.0),
        ("\u6771\u4eac\u306f\u9996\u90fd", "\u6771\u4eac", 1.0),  # no spaces between words
        ("48\u5186", "48", 1.0),
    ],
)
def test_unicode_spellings(text: str, reference: str, score: float) -> None:
    assert contains(text, reference) == score


def test_any_of_several_accepted_texts_is_enough() -> None:
    assert contains("It is 1,480.", ["1480", "1,480"]) == 1.0
    assert contains("It is 1,490.", ["1480", "1,480"]) == 0.0


def test_an_empty_completion_scores_zero() -> None:
    assert contains("", "48") == 0.0


@pytest.mark.parametrize(
    "reference", [None, 48, "", " ", ".", [], ["a", ""], ["a", None], {"a": 1}]
)
def test_another_reference_is_an_error_and_not_a_zero(reference: object) -> None:
    with pytest.raises(ValueError, match="must be a text, or a list of accepted texts"):
        contains("48", reference)


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("a" * 200_000 + "b", "a" * 5000, 0.0),
        ("ab" * 100_000, "abab" * 500, 0.0),
        ("xa " * 100_000 + "a", "a", 1.0),
        ("_a" * 100_000 + "b", "a", 0.0),
        ("b" + "_" * 200_000 + "a" + "_" * 200_000 + "b", "a", 0.0),
        ("a" + "\u0301\u0323" * 100_000, "b", 0.0),
    ],
)
@pytest.mark.timeout(20)  # the quadratic form takes minutes
def test_long_answers_and_repetitions_take_linear_time(
    text: str, answer: str, score: float
) -> None:
    assert contains(text, answer) == score


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("aaaa", "aa", 0.0),
        ("aa aaa", "aa", 1.0),
        ("aba ababa", "aba", 1.0),
        ("xaba abab", "aba", 0.0),
        ("1.1.1 1.1", "1.1", 1.0),
        ("a__", "a", 1.0),
        ("b__a__b a", "a", 1.0),
    ],
)
def test_an_answer_that_overlaps_itself_is_found_at_each_place(
    text: str, answer: str, score: float
) -> None:
    assert contains(text, answer) == score
