"""What a preflight measured, as a table and as JSON."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


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
    """

    rows: int
    student: Role
    teacher: Role
    other: Role
    demonstrations_right: float | None
    better_with_own: int
    better_with_other: int
    kl: float
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
            f"KL(teacher || student) {self.kl:.2f} nats a token on the student's own answers; the "
            f"first token agrees in {self.first_token_agreement:.0%} of rows.",
            f"Longest prompt {self.prompt_tokens} tokens, teacher prompt "
            f"{self.teacher_prompt_tokens}, demonstration {self.demonstration_tokens}, completions "
            f"up to {self.max_new_tokens}; the model takes {self.max_length}. {self.left_out} rows "
            "skipped or truncated as too long.",
            f"An optimizer step here: about {self.step_seconds:.1f} s, {self.memory_gb:.1f} GB.",
        ]
        return "\n".join(lines)
