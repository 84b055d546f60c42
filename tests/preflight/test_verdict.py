"""From measurements to a verdict."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from sdft_lightning.errors import UserError
from sdft_lightning.graders import wilson_interval
from sdft_lightning.preflight import Limits, Report, Role, judge


def role(accuracy: float | None, rows: int = 32, **changes: Any) -> Role:
    low = high = None
    if accuracy is not None:
        low, high = wilson_interval(accuracy * rows, rows)
    found = Role(accuracy, low, high, truncated=0.0, artifacts=0.0, copied=0.0)
    return found._replace(**changes)


def report(
    student: float | None,
    teacher: float | None,
    other: float | None,
    own_only: int = 12,
    other_only: int = 1,
    **changes: Any,
) -> Report:
    found = Report(
        rows=32,
        student=role(student),
        teacher=role(teacher),
        other=role(other),
        demonstrations_right=1.0,
        better_with_own=own_only,
        better_with_other=other_only,
        kl=0.9,
        kl_of_manner=0.3,
        first_token_agreement=0.7,
        prompt_tokens=40,
        teacher_prompt_tokens=100,
        demonstration_tokens=17,
        left_out=0,
        too_long=[],
        max_new_tokens=100,
        max_length=2048,
        step_seconds=3.0,
        memory_gb=2.0,
        retaining_options=["--data.retain=example:retain/prompts.jsonl"],
    )
    return found._replace(**changes)


@pytest.mark.parametrize(
    ("found", "name", "code", "reason"),
    [
        (report(0.0, 0.9, 0.5), "go", 0, ""),
        (report(0.3, 0.3, 0.3), "use SFT", 2, "nothing to teach"),
        (report(0.5, 0.4, 0.3), "use SFT", 2, "40% against 50%"),
        # Better by 12 points, which 32 rows cannot tell from luck.
        (report(0.31, 0.44, 0.2), "use SFT", 2, "nothing to teach"),
        (report(0.0, 0.4, 0.1), "warn", 1, "right in 40% only"),
        (report(0.0, 0.9, 0.85), "warn", 1, "helps about as much"),
        # Better by 12 points, but in as good as as many rows worse.
        (report(0.0, 0.7, 0.58, 8, 4), "warn", 1, "helps about as much"),
        (report(0.0, 0.7, 0.7, 0, 0), "warn", 1, "helps about as much"),
        (report(0.95, 1.0, 0.9), "warn", 1, "right already"),
        (report(0.95, 0.3, 0.3), "use SFT", 2, "nothing to teach"),
        (report(None, None, None), "warn", 1, "data.grader"),
        (report(0.0, 0.9, 0.5, left_out=3), "warn", 1, "3 training rows"),
        (
            report(0.0, 0.9, 0.5)._replace(teacher=role(0.9, artifacts=0.3)),
            "warn",
            1,
            "num_loss_tokens_to_skip",
        ),
        (
            report(0.0, 0.9, 0.5)._replace(teacher=role(0.9, truncated=0.8)),
            "warn",
            1,
            "evaluation.max_new_tokens",
        ),
        (report(0.0, 0.9, 0.5)._replace(teacher=role(0.9, copied=0.95)), "go", 0, ""),
        (report(0.0, 0.9, 0.5, demonstrations_right=0.5), "go", 0, ""),
        (report(0.0, 0.9, 0.5, demonstrations_right=None), "go", 0, ""),
        (
            report(0.0, 0.7, 0.1, demonstrations_right=0.06),
            "warn",
            1,
            "right in 6% of their rows (limits.demonstrations is 50%): they stand in the wrong",
        ),
        (
            report(0.0, 0.9, 0.5)._replace(teacher=role(0.9, copied=0.96)),
            "warn",
            1,
            "limits.copied is 95%",
        ),
        (report(0.0, 0.9, 0.5, kl=math.nan), "warn", 1, "KL(teacher || student) is nan"),
        (report(0.0, 0.9, 0.5, kl=math.inf), "warn", 1, "KL(teacher || student) is inf"),
        (report(0.0, 0.9, 0.5, too_long=["data.train: 3 of 9"]), "warn", 1, "data.train: 3 of 9"),
        (report(0.3, 0.3, 0.3, too_long=["data.train: 3 of 9"]), "use SFT", 2, "data.train: 3 of"),
    ],
)
def test_verdicts(found: Report, name: str, code: int, reason: str) -> None:
    verdict = judge(found)
    assert (verdict.name, verdict.exit_code) == (name, code)
    assert bool(verdict.reasons) == bool(reason)
    assert reason in " ".join(verdict.reasons)


def test_prompts_that_do_not_fit_the_model_are_no_go() -> None:
    verdict = judge(
        report(0.0, 0.9, 0.5, prompt_tokens=3000, teacher_prompt_tokens=5000, max_length=512)
    )
    assert (verdict.name, verdict.exit_code) == ("warn", 1)
    of_prompt, of_teacher_prompt = verdict.reasons
    for text in ("3000", "100", "512", "model.sampling.max_new_tokens", "data.lengths.prompt,"):
        assert text in of_prompt
    for text in ("5000", "512", "data.lengths.teacher_prompt,", "skip or truncate"):
        assert text in of_teacher_prompt


@pytest.mark.parametrize(("max_length", "name"), [(200, "go"), (199, "warn")])
def test_the_completion_must_fit_behind_the_teacher_prompt(max_length: int, name: str) -> None:
    # 100 tokens of the teacher's prompt and a completion of up to 100.
    assert judge(report(0.0, 0.9, 0.5, max_length=max_length)).name == name


def test_the_limits_are_options() -> None:
    found = report(0.0, 0.4, 0.1)
    assert judge(found, Limits(teacher=0.3)).name == "go"
    assert judge(found, Limits(teacher=0.3, gain=0.5)).name == "use SFT"
    assert judge(found, Limits(teacher=0.3, information=0.35)).name == "warn"


@pytest.mark.parametrize(
    "name", ["gain", "teacher", "information", "artifacts", "truncated", "copied", "demonstrations"]
)
def test_a_limit_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"limits\.{name}: got 50"):
        Limits(**{name: 50})


def test_the_report_is_plain_json_and_its_table_names_all_roles() -> None:
    found = report(0.0, 0.9, 0.5)
    assert json.loads(json.dumps(found.as_dict()))["teacher"]["accuracy"] == 0.9
    table = found.table()
    for text in ("student, bare", "teacher, own", "teacher, another", "90%", "0.90 nats", "2048"):
        assert text in table
    assert "not graded" in report(None, None, None).table()


def test_a_kl_that_is_no_number_is_null_in_json() -> None:
    assert report(0.0, 0.9, 0.5, kl=math.nan).as_dict()["kl"] is None
    assert report(0.0, 0.9, 0.5).as_dict()["kl"] == 0.9


def test_rows_to_retain_are_recommended_where_the_teacher_s_manner_is_far_off() -> None:
    found = report(
        0.0, 0.9, 0.5, retaining_options=["--data.retain=a", "--model.initial_copy=true"]
    )
    line = "Recommended, against forgetting: --data.retain=a --model.initial_copy=true. "
    assert line in found.table()
    assert "0.30 with another row's demonstration" in found.table()
    near = found._replace(kl_of_manner=0.15)
    retained = found._replace(retaining_options=[])
    for other in (near, retained):
        assert "Recommended" not in other.table()
    assert judge(found).name == "go", "it is no warning"
