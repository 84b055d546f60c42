"""What tells that a run has collapsed, or cannot teach any more: pure functions of its metrics."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sdft_lightning.errors import UserError

# What a sign looks at; the guard reads these names under train/.
WATCHED = ("loss", "distinct_2", "truncated_fraction", "student_entropy", "teacher_entropy")
# Repetition runs to the length limit. Short answers of one form, like labels, repeat each other
# and end: they are no collapse.
_MOST_END = 0.5


@dataclass(frozen=True)
class CollapseLimits:
    """Where a value becomes a sign of collapse; null switches a sign off.

    Shares are of the run's first step, whose completions the untrained model wrote: how much text
    repeats itself, or how sure a model is, differs from task to task.

    Args:
        distinct_2: Repetition: distinct word pairs fell below this share of the first step's, while
            at least half of the completions run to the length limit.
        truncated_fraction: Completions no longer end: at least this fraction runs to the length
            limit, and at the first step less than half as many did.
        student_entropy: The student is certain of everything: its entropy fell below this share of
            the first step's. A task whose right answer is one certain text may need a lower one.
        student_uniform: The student knows nothing: its entropy rose above this share of log V, the
            entropy of a uniform distribution, below which the first step's was.
        teacher_entropy: The teacher knows nothing: its entropy is above this share of log V.
        teacher_lead: Its answers are no better: teacher_accuracy − accuracy is at most this.
    """

    distinct_2: float | None = 0.25
    truncated_fraction: float | None = 0.95
    student_entropy: float | None = 0.02
    student_uniform: float | None = 0.9
    teacher_entropy: float | None = 0.9
    teacher_lead: float | None = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        for name, value in vars(self).items():
            if name == "teacher_lead":
                continue
            if value is not None and not 0 < value <= 1:
                raise UserError(
                    f"CollapseGuard.limits.{name}: got {value}, allowed are shares above 0 and up "
                    "to 1, or null to leave this sign out."
                )


def known_signs(logged: Collection[str]) -> list[str]:
    """The signs that can be judged from the values that a method logs, see `step_signs`."""
    of = {"loss": "loss", "distinct_2": "repetition", "truncated_fraction": "truncation"}
    found = ["weights", *(sign for name, sign in of.items() if name in logged)]
    if "teacher_entropy" in logged:
        found += ["entropy", "student_uniform", "teacher_uniform"]
    return found


def step_signs(
    now: Mapping[str, float], first: Mapping[str, float], limits: CollapseLimits, vocabulary: int
) -> dict[str, str]:
    """Which signs of collapse a training step shows.

    Args:
        now: Values of the step by the names of `WATCHED`; a method that logs fewer shows fewer.
            `largest_weight`: the largest absolute value of a trained weight after the step.
        first: Those of the run's first step.
        limits: Where the signs begin.
        vocabulary: V.

    Returns:
        A sentence for each sign, by name: loss, weights, repetition, truncation, entropy,
        student_uniform, teacher_uniform.
    """
    found: dict[str, str] = {}
    if not math.isfinite(now.get("loss", 0.0)):
        found["loss"] = f"the loss is {now['loss']}"
    if not math.isfinite(now.get("largest_weight", 0.0)):
        found["weights"] = f"a trained weight is {now['largest_weight']} after the step"
    truncated = now.get("truncated_fraction", 0.0)
    low = _share(limits.distinct_2, first.get("distinct_2"))
    if low is not None and now["distinct_2"] < low and truncated >= _MOST_END:
        found["repetition"] = "completions repeat themselves: " + _from("distinct_2", now, first)
    limit = limits.truncated_fraction
    if limit is not None and truncated >= limit > 2 * first.get("truncated_fraction", 1.0):
        found["truncation"] = "completions no longer end: " + _from(
            "truncated_fraction", now, first
        )
    if "teacher_entropy" in now:  # on demonstrations (SFT) entropy falls: they are learned by heart
        found |= _entropy_signs(now, first, limits, math.log(vocabulary))
    return found


def _entropy_signs(
    now: Mapping[str, float], first: Mapping[str, float], limits: CollapseLimits, uniform: float
) -> dict[str, str]:
    found: dict[str, str] = {}
    low = _share(limits.student_entropy, first["student_entropy"])
    if low is not None and now["student_entropy"] < low:
        found["entropy"] = "the student is certain of all: " + _from("student_entropy", now, first)
    high = _share(limits.student_uniform, uniform)
    if high is not None and now["student_entropy"] > high >= first["student_entropy"]:
        found["student_uniform"] = (
            f"the student knows nothing: {_from('student_entropy', now, first)}, a uniform "
            f"distribution has {uniform:.3g}"
        )
    high = _share(limits.teacher_entropy, uniform)
    if high is not None and now["teacher_entropy"] > high:
        found["teacher_uniform"] = (
            f"the teacher knows nothing: teacher_entropy {now['teacher_entropy']:.3g} nats, a "
            f"uniform distribution has {uniform:.3g}"
        )
    return found


def _from(name: str, now: Mapping[str, float], first: Mapping[str, float]) -> str:
    return f"{name} {now[name]:.3g}, at the first step {first[name]:.3g}"


def validation_signs(metrics: Mapping[str, float], limits: CollapseLimits) -> dict[str, str]:
    """Which signs a validation shows.

    Args:
        metrics: What was logged, by whole names such as val/task/<name>/accuracy.
        limits: Where the signs begin.

    Returns:
        `teacher_no_better` with its sentence, if a task whose teacher was graded shows it.
    """
    for name, teacher in metrics.items():
        base, _, metric = name.rpartition("/")
        student = metrics.get(f"{base}/accuracy")
        if metric != "teacher_accuracy" or student is None or limits.teacher_lead is None:
            continue
        if teacher - student <= limits.teacher_lead:
            sentence = (
                f"the teacher no longer beats the student: {name} {teacher:.3g}, accuracy "
                f"{student:.3g}; it has nothing more to teach"
            )
            return {"teacher_no_better": sentence}
    return {}


def _share(share: float | None, whole: float | None) -> float | None:
    return None if share is None or whole is None else share * whole
