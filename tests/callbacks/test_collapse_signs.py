"""Signs of collapse as a pure function: what is one, and what of a healthy run is none."""

from __future__ import annotations

import math

import pytest

from sdft_lightning.callbacks.stops import CollapseLimits, step_signs, validation_signs
from sdft_lightning.errors import UserError

FIRST = {
    "loss": 0.9,
    "distinct_2": 0.8,
    "truncated_fraction": 0.4,
    "student_entropy": 1.0,
    "teacher_entropy": 0.9,
}
LIMITS = CollapseLimits()

# configs/demo_sdft.yaml with max_new_tokens 14, embedded model, seed 42, steps 1 to 32, as
# logged in metrics.jsonl (rounded): new ability rose, general ability stayed within its interval.
HEALTHY = {
    "loss": [
        0.924, 0.792, 0.81, 0.768, 0.907, 0.711, 0.755, 0.567, 0.785, 0.903, 0.659, 0.564, 0.549,
        0.524, 0.714, 0.475, 0.481, 0.489, 0.48, 0.476, 0.498, 0.506, 0.409, 0.322, 0.324, 0.445,
        0.298, 0.361, 0.335, 0.242, 0.341, 0.453,
    ],
    "student_entropy": [
        0.996, 1.112, 0.859, 0.74, 1.008, 1.121, 1.233, 0.906, 1.024, 0.961, 0.985, 0.929, 1.04,
        1.28, 1.161, 1.08, 1.122, 1.176, 1.113, 1.071, 1.079, 1.118, 0.997, 0.907, 0.846, 0.969,
        0.673, 0.786, 0.897, 0.698, 0.82, 1.023,
    ],
    "teacher_entropy": [
        0.908, 1.048, 0.782, 0.603, 0.797, 0.824, 0.931, 0.534, 0.633, 0.628, 0.618, 0.612, 0.665,
        0.781, 0.645, 0.673, 0.661, 0.738, 0.618, 0.648, 0.756, 0.724, 0.594, 0.635, 0.558, 0.744,
        0.444, 0.587, 0.645, 0.509, 0.552, 0.721,
    ],
    "truncated_fraction": [
        1.0, 0.938, 0.938, 0.875, 0.438, 0.812, 0.938, 0.875, 0.938, 0.938, 0.688, 0.875, 0.688,
        0.75, 0.562, 0.625, 0.75, 0.938, 0.938, 0.812, 0.938, 0.75, 0.75, 0.875, 0.875, 0.688,
        0.625, 0.562, 0.75, 0.75, 0.625, 0.75,
    ],
    "distinct_2": [
        0.76, 0.876, 0.702, 0.61, 0.709, 0.738, 0.801, 0.655, 0.719, 0.693, 0.74, 0.701, 0.696,
        0.763, 0.711, 0.668, 0.738, 0.723, 0.705, 0.698, 0.707, 0.737, 0.738, 0.657, 0.676, 0.691,
        0.616, 0.675, 0.615, 0.631, 0.589, 0.705,
    ],
}  # fmt: skip
EMBEDDED_VOCABULARY = 49152


def signs(first: dict[str, float] = FIRST, **now: float) -> dict[str, str]:
    return step_signs({**FIRST, **now}, first, LIMITS, vocabulary=1000)


def test_no_step_of_the_healthy_demo_shows_a_sign() -> None:
    steps = [
        dict(zip(HEALTHY, values, strict=True)) for values in zip(*HEALTHY.values(), strict=True)
    ]
    assert len(steps) == 32
    for number, step in enumerate(steps, start=1):
        found = step_signs(step, steps[0], LIMITS, EMBEDDED_VOCABULARY)
        assert found == {}, f"step {number}"


@pytest.mark.parametrize(
    ("now", "sign", "words"),
    [
        ({"loss": math.nan}, "loss", "the loss is nan"),
        ({"loss": math.inf}, "loss", "the loss is inf"),
        ({"largest_weight": math.nan}, "weights", "a trained weight is nan after the step"),
        (
            {"distinct_2": 0.19, "truncated_fraction": 0.9},
            "repetition",
            "distinct_2 0.19, at the first step 0.8",
        ),
        (
            {"truncated_fraction": 0.95},
            "truncation",
            "truncated_fraction 0.95, at the first step 0.4",
        ),
        ({"student_entropy": 0.019}, "entropy", "student_entropy 0.019, at the first step 1"),
        # 0.9 · log 1000 = 6.217
        ({"student_entropy": 6.22}, "student_uniform", "6.22, at the first step 1, a uniform"),
        ({"teacher_entropy": 6.22}, "teacher_uniform", "a uniform distribution has 6.91"),
    ],
)
def test_each_sign_is_named_with_its_numbers(now: dict[str, float], sign: str, words: str) -> None:
    found = signs(**now)
    assert list(found) == [sign]
    assert words in found[sign]


@pytest.mark.parametrize(
    "now",
    [
        {"distinct_2": 0.21, "truncated_fraction": 0.9},
        {"truncated_fraction": 0.94},
        {"student_entropy": 0.021},
        {"student_entropy": 6.21},
        {"teacher_entropy": 6.21},
    ],
)
def test_just_inside_the_limits_is_no_sign(now: dict[str, float]) -> None:
    assert signs(**now) == {}


def test_short_answers_of_one_form_are_no_repetition() -> None:
    # 32 rows of {"team": "billing"}: hardly any distinct pairs, but every answer ends.
    assert signs(distinct_2=0.05, truncated_fraction=0.0) == {}


def test_a_run_whose_completions_are_cut_from_the_start_shows_no_truncation() -> None:
    first = {**FIRST, "truncated_fraction": 0.5}
    assert signs(first, truncated_fraction=1.0) == {}


def test_a_student_that_knew_nothing_from_the_start_shows_no_collapse() -> None:
    first = {**FIRST, "student_entropy": 6.5}
    assert signs(first, student_entropy=6.6) == {}


def test_entropy_on_demonstrations_may_fall() -> None:
    sft = {"loss": 0.001, "student_entropy": 0.001}
    assert step_signs(sft, {"loss": 2.0, "student_entropy": 2.0}, LIMITS, 1000) == {}


def test_null_leaves_each_sign_out() -> None:
    off = CollapseLimits(None, None, None, None, None, None)
    now = {
        "loss": 1.0,
        "distinct_2": 0.0,
        "truncated_fraction": 1.0,
        "student_entropy": 0.0,
        "teacher_entropy": 9.0,
    }
    assert set(step_signs(now, FIRST, LIMITS, 1000)) == {
        "repetition",
        "truncation",
        "entropy",
        "teacher_uniform",
    }
    assert step_signs(now, FIRST, off, 1000) == {}
    assert step_signs({**now, "student_entropy": 6.9}, FIRST, off, 1000) == {}
    assert validation_signs({"val/task/a/teacher_accuracy": 0, "val/task/a/accuracy": 1}, off) == {}


@pytest.mark.parametrize(("teacher", "student", "sign"), [(0.5, 0.5, 1), (0.51, 0.5, 0)])
def test_teacher_must_beat_the_student_where_both_were_graded(
    teacher: float, student: float, sign: int
) -> None:
    metrics = {
        "val/task/a/accuracy": student,
        "val/task/a/teacher_accuracy": teacher,
        "val/task/b/accuracy": 1.0,
    }
    found = validation_signs(metrics, LIMITS)
    assert len(found) == sign
    if sign:
        assert "val/task/a/teacher_accuracy 0.5, accuracy 0.5" in found["teacher_no_better"]


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5])
def test_what_is_no_share_is_refused_and_the_option_named(value: float) -> None:
    with pytest.raises(UserError, match=r"CollapseGuard\.limits\.distinct_2: got .* or null"):
        CollapseLimits(distinct_2=value)
