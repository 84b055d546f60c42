"""From measurements to go, warn or use SFT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from sdft_lightning.errors import UserError
from sdft_lightning.preflight.report import Report


@dataclass(frozen=True)
class Limits:
    """What a run needs to be let go; fractions of 1.

    Args:
        gain: The teacher must be better than the student by so much.
        teacher: A teacher below this accuracy is warned of: it is the ceiling of the student.
        information: It must be better by so much with its own demonstration than with another
            row's, and by more than luck.
        artifacts: More completions of the teacher that speak of a text or example are warned of.
        truncated: More completions of the teacher without an end are warned of.
        copied: More completions of the teacher that hold the whole demonstration, or are all of it,
            are warned of. Short answers may well be repeated; a teacher that does nothing else
            comes to plain SFT on the demonstrations.
        demonstrations: Where fewer demonstrations are right in their own rows, it is warned.
    """

    gain: float = 0.1
    teacher: float = 0.5
    information: float = 0.1
    artifacts: float = 0.1
    truncated: float = 0.5
    copied: float = 0.95
    demonstrations: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no fraction."""
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise UserError(f"limits.{name}: got {value}, allowed are 0 to 1 (a fraction).")


class Verdict(NamedTuple):
    """go, warn or use SFT; why; and the exit code 0, 1 or 2."""

    name: str
    reasons: list[str]
    exit_code: int


def judge(report: Report, limits: Limits = Limits()) -> Verdict:
    """Decide whether a run can work.

    Args:
        report: What was measured.
        limits: What is asked for.

    Returns:
        `use SFT` where the teacher is no better than the student, `warn` where something else is
        likely to go wrong, else `go`.
    """
    student, teacher, other = (
        role.accuracy for role in (report.student, report.teacher, report.other)
    )
    warnings = _warnings(report, limits)
    if student is None or teacher is None or other is None:
        reason = (
            "nothing was graded, so it is not known whether the teacher is better: set data.grader "
            "and data.columns.reference, and fill the references of the training rows"
        )
        return Verdict("warn", [reason, *warnings], 1)
    if student > 1 - limits.gain and teacher >= student - limits.gain:
        return Verdict("warn", [f"the student is right already in {student:.0%}", *warnings], 1)
    low = report.teacher.low
    if teacher - student < limits.gain or (low is not None and low <= student):
        reason = (
            f"the teacher is not better than the student ({teacher:.0%} against {student:.0%} of "
            f"{report.rows} rows): it has nothing to teach. Look at demonstrations and prompt "
            "style (small models need `turns` or `context`), or train with SFTModule"
        )
        return Verdict("use SFT", [reason, *warnings], 2)
    if teacher < limits.teacher:
        warnings.insert(
            0, f"the teacher is right in {teacher:.0%} only, and the student cannot pass it"
        )
    if teacher - other < limits.information or not _informs(report):
        warnings.insert(
            0,
            f"another row's demonstration helps about as much ({other:.0%} against {teacher:.0%}): "
            "the demonstrations say nothing, stand in the wrong rows, or teach a form only",
        )
    return Verdict("warn", warnings, 1) if warnings else Verdict("go", [], 0)


def _informs(report: Report) -> bool:
    """Whether the own demonstration beats another row's by more than luck (sign test, z = 2)."""
    own, other = report.better_with_own, report.better_with_other
    return own - other >= 2 * math.sqrt(own + other) and own > other


def _warnings(report: Report, limits: Limits) -> list[str]:
    found = [*report.too_long, *_length_warnings(report)]
    if not math.isfinite(report.kl):
        found.append(
            f"KL(teacher || student) is {report.kl}, and the loss would be: set "
            "trainer.precision=32-true and model.policy.weights_dtype=float32, and see whether the "
            "model's weights are finite"
        )
    right = report.demonstrations_right
    if right is not None and right < limits.demonstrations:
        found.append(
            f"the demonstrations themselves are right in {right:.0%} of their rows "
            f"(limits.demonstrations is {limits.demonstrations:.0%}): they stand in the wrong "
            "rows, say nothing, or the references and the grader do not fit them"
        )
    if report.teacher.copied > limits.copied:
        found.append(
            f"the teacher repeats its demonstration in {report.teacher.copied:.0%} of its answers "
            f"(limits.copied is {limits.copied:.0%}), which teaches no more than SFT does: choose "
            "another prompt style, or train with SFTModule"
        )
    if report.teacher.artifacts - report.student.artifacts > limits.artifacts:
        found.append(
            f"the teacher speaks of the text or example it was shown in "
            f"{report.teacher.artifacts:.0%} of its answers, and the student will learn to: choose "
            "another prompt style, or set model.num_loss_tokens_to_skip"
        )
    if report.teacher.truncated > limits.truncated:
        found.append(
            f"{report.teacher.truncated:.0%} of the teacher's answers are cut off before they end: "
            "raise model.evaluation.max_new_tokens and model.sampling.max_new_tokens"
        )
    if report.left_out:
        found.append(f"{report.left_out} training rows are skipped or truncated as too long")
    return found


def _length_warnings(report: Report) -> list[str]:
    """Prompts that leave the model no room for a completion."""
    room = report.max_length - report.max_new_tokens
    longest = {"prompt": report.prompt_tokens, "teacher_prompt": report.teacher_prompt_tokens}
    return [
        f"the longest {name.replace('_', ' ')} ({tokens} tokens) with a completion of up to "
        f"{report.max_new_tokens} (model.sampling.max_new_tokens) does not fit: the model takes "
        f"{report.max_length}. Three remedies: lower model.sampling.max_new_tokens; lower "
        f"data.lengths.{name}, with data.lengths.too_long: skip or truncate; or choose a model "
        "that takes more"
        for name, tokens in longest.items()
        if tokens > room
    ]
