"""Graders: text -> score in [0, 1], chosen by name; and how sure a score over n texts is."""

from sdft_lightning.graders.intervals import (
    Paired,
    mcnemar,
    paired_test,
    pass_at_k,
    sign_flip_p,
    wilson_interval,
)
from sdft_lightning.graders.judge import Answer, Judge, JudgeSettings, Usage
from sdft_lightning.graders.registry import (
    GRADERS,
    GoldSelfTest,
    Grader,
    check_reference,
    get_grader,
    gold_self_test,
    gold_text,
    grade_rows,
    grader_names,
    is_dotted,
    judged_answers,
)
from sdft_lightning.graders.rubrics import JUDGED

__all__ = [
    "GRADERS",
    "JUDGED",
    "Answer",
    "GoldSelfTest",
    "Grader",
    "Judge",
    "JudgeSettings",
    "Paired",
    "Usage",
    "check_reference",
    "get_grader",
    "gold_self_test",
    "gold_text",
    "grade_rows",
    "grader_names",
    "is_dotted",
    "judged_answers",
    "mcnemar",
    "paired_test",
    "pass_at_k",
    "sign_flip_p",
    "wilson_interval",
]
