"""What validate and test show in the terminal."""

from __future__ import annotations

from sdft_lightning.callbacks.terminal import paired_table, result_table
from sdft_lightning.graders import Paired


def test_what_was_lost_and_gained_is_told_in_words() -> None:
    tests = {
        "front_desk/accuracy": Paired(170, 5, 2, 0.453, True),
        "kept_text/word_perplexity": Paired(18, 17, 1, 0.0002, False),
        "odd\x1b[31m/acc": Paired(3, 0, 0, 1.0, True),
    }
    lines = paired_table(tests, "the model before the first step").splitlines()
    assert lines[:5] == [
        "Compared with the model before the first step:",
        "task        what             item by item",
        "front_desk  student          5 lost, 2 gained of 170, p 0.45",
        "kept_text   word_perplexity  17 lower, 1 higher of 18, p below 0.001",
        "odd [31m    acc              0 lost, 0 gained of 3, p 1.00",
    ]
    assert "lost: right before and wrong now" in lines[5]


def test_length_and_distinctness_stand_beside_the_accuracy() -> None:
    name = "val/task/front_desk"
    metrics = {
        f"{name}/accuracy": 0.5,
        f"{name}/accuracy_low": 0.4,
        f"{name}/accuracy_high": 0.6,
        f"{name}/answer_words": 12.34,
        f"{name}/answer_distinct_2": 0.987,
        "val/paired/front_desk/accuracy/lost": 3.0,
    }
    assert result_table(metrics, "val").splitlines() == [
        "task        what                      value  95 % interval",
        "front_desk  student                   50.0%  40.0% to 60.0%",
        "front_desk  words an answer           12.3",
        "front_desk  different pairs of words  98.7%",
    ]
