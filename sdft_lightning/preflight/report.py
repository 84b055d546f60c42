"""From what a preflight measured to a table, JSON, and go, warn or use SFT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from sdft_lightning.errors import UserError


class Role(NamedTuple):
    """How one role did on the sample.

    Attributes:
        accuracy: Mean score; None where nothing is graded.
        low: Lower end of its 95 % Wilson interval.
        high: Upper end.
        truncated: Fraction of completions without a stop token.
        artifacts: Fraction of completions that speak of the text or example they were shown.
        copied: Fraction of completions that hold the whole demonstration, or are all of it.
    """

    accuracy: float | None
    low: float | None
    high: float | None
    truncated: float
    artifacts: float
    copied: float


class Report(NamedTuple):
    """What a preflight measured on `rows` training rows.

    Attributes:
        rows: Size of the sample.
        student: The policy on the bare question.
        teacher: The same with its demonstration.
        other: The same with demonstration and context of another row.
        demonstrations_right: Fraction of all training rows that are kept whose demonstration itself
            is right by the grader; None where nothing is graded, or a judge would be asked.
        better_with_own: Rows in which the own demonstration scores higher than another row's.
        better_with_other: Rows in which it scores lower.
        kl: KL(teacher ‖ student) on the student's own completions, nats a token; before training
            the student is the base model.
        kl_of_manner: The same where the teacher is shown another row's demonstration and context,
            which tell nothing about the question: what the student will take over in all that it
            says.
        first_token_agreement: Fraction of rows where both put the same token first.
        prompt_tokens: Longest student prompt of all training rows that are kept.
        teacher_prompt_tokens: Longest teacher prompt.
        demonstration_tokens: Longest demonstration.
        left_out: Training rows skipped or truncated as too long.
        too_long: Of each set in which `fit` would stop at a row that is too long: how many do not
            fit, the first with its lengths, and the remedies.
        max_new_tokens: Longest completion that the student samples.
        max_length: Longest sequence that the model takes.
        step_seconds: One optimizer step on this machine, from one measured micro-batch.
        memory_gb: Peak memory with gradients and AdamW's two averages, in gigabytes.
        retaining_options: Options that add rows to retain; none where the run has such rows.
    """

    rows: int
    student: Role
    teacher: Role
    other: Role
    demonstrations_right: float | None
    better_with_own: int
    better_with_other: int
    kl: float
    kl_of_manner: float
    first_token_agreement: float
    prompt_tokens: int
    teacher_prompt_tokens: int
    demonstration_tokens: int
    left_out: int
    too_long: list[str]
    max_new_tokens: int
    max_length: int
    step_seconds: float
    memory_gb: float
    retaining_options: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no nan and no infinity: null stands for them."""
        found = {
            name: value._asdict() if isinstance(value, Role) else value
            for name, value in self._asdict().items()
        }
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in found.items()
        }

    def table(self) -> str:
        """The report as text."""
        roles = [
            ("student, bare question", self.student),
            ("teacher, own demonstration", self.teacher),
            ("teacher, another row's", self.other),
        ]
        rows = [("who", "accuracy", "95 % interval", "truncated", "artifacts", "copied")]
        for name, role in roles:
            graded = role.accuracy is not None
            rows.append(
                (
                    name,
                    f"{role.accuracy:.0%}" if graded else "not graded",
                    f"{role.low:.0%} to {role.high:.0%}" if graded else "",
                    f"{role.truncated:.0%}",
                    f"{role.artifacts:.0%}",
                    f"{role.copied:.0%}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if self.demonstrations_right is not None:
            lines.append(
                f"The demonstrations themselves are right in {self.demonstrations_right:.0%} of "
                "the training rows."
            )
        lines += [
            "",
            f"KL(teacher || student) {self.kl:.2f} nats a token on the student's own answers, "
            f"{self.kl_of_manner:.2f} with another row's demonstration; the first token agrees in "
            f"{self.first_token_agreement:.0%} of rows.",
            f"Longest prompt {self.prompt_tokens} tokens, teacher prompt "
            f"{self.teacher_prompt_tokens}, demonstration {self.demonstration_tokens}, completions "
            f"up to {self.max_new_tokens}; the model takes {self.max_length}. {self.left_out} rows "
            "skipped or truncated as too long.",
            f"An optimizer step here: about {self.step_seconds:.1f} s, {self.memory_gb:.1f} GB.",
        ]
        if self.drifts and self.retaining_options:
            options = " ".join(self.retaining_options)
            lines.append(
                f"Recommended, against forgetting: {options}. Even with another "
                f"row's demonstration the teacher is {self.kl_of_manner:.2f} nats a token from the "
                f"student, above {DRIFT}: the student will take over its manner also where nobody "
                "trains it."
            )
        return "\n".join(lines)

    @property
    def drifts(self) -> bool:
        """Whether the student can be expected to drift where it is not trained."""
        return self.kl_of_manner > DRIFT


# Nats a token; docs/retain.md says why.
DRIFT = 0.15


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
