"""Graders: text -> score in [0, 1], chosen by name; and how sure a score over n texts is."""

from sdft_lightning.graders.intervals import wilson_interval
from sdft_lightning.graders.judge import JUDGED, Answer, Judge, JudgeSettings, Usage
from sdft_lightning.graders.pass_at_k import pass_at_k
from sdft_lightning.graders.registry import (
    GRADERS,
    Grader,
    check_reference,
    get_grader,
    grade_rows,
    grader_names,
    judged_answers,
)
from sdft_lightning.graders.self_test import GoldSelfTest, gold_self_test, gold_text

__all__ = [
    "GRADERS",
    "JUDGED",
    "Answer",
    "GoldSelfTest",
    "Grader",
    "Judge",
    "JudgeSettings",
    "Usage",
    "check_reference",
    "get_grader",
    "gold_self_test",
    "gold_text",
    "grade_rows",
    "grader_names",
    "judged_answers",
    "pass_at_k",
    "wilson_interval",
]
