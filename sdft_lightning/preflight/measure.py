"""Measures student and teacher on a sample of training rows."""

from __future__ import annotations

import logging
import math
import random
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from sdft_lightning.data.prompts import demonstration_text
from sdft_lightning.errors import UserError
from sdft_lightning.graders import JUDGED, Judge, gold_self_test, grade_rows, wilson_interval
from sdft_lightning.preflight.report import Report, Role
from sdft_lightning.types import Demonstration, PromptBatch

log = logging.getLogger(__name__)

# What a model says when it talks about what it was shown instead of answering.
ARTIFACTS = re.compile(
    r"\b(the|this|that|your) (text|passage|example|context|document|excerpt|demonstration)\b"
    r"|\b(based on|according to) (the|this|your) "
    r"(text|passage|example|context|document|information|response)"
    r"|\b(provided|given|mentioned|stated|described) (above|earlier|in the (text|passage|example))",
    re.IGNORECASE,
)

Grading = Callable[[Sequence[str], Sequence[Demonstration]], list[float]]


class TrainingData(Protocol):
    """What a preflight needs of a data module, after `setup("fit")`."""

    grader: str | None
    batch_size: int
    eval_batch_size: int
    grade_thoughts: bool

    @property
    def retained_new_tokens(self) -> int:
        """Longest answer to a row to retain; 0 where there are no such rows."""
        ...

    @property
    def judge(self) -> Judge | None:
        """Who is asked by the graders that ask."""
        ...

    @property
    def too_long(self) -> list[str]:
        """Of each set in which `fit` would stop at a row that is too long, what is to be said."""
        ...

    def training_rows(self) -> list[Demonstration]:
        """All training rows that fit."""
        ...

    def batch_of(self, rows: Sequence[Demonstration]) -> PromptBatch:
        """Rows rendered, tokenized and padded."""
        ...

    def training_lengths(self) -> tuple[int, int, int, int]:
        """Longest prompt, teacher prompt and demonstration, and rows left out or cut."""
        ...


def run_preflight(
    module: Any, data: TrainingData, rows: int, seed: int, max_length: int, accumulate: int = 1
) -> Report:
    """Measure a run before it starts; no weight changes.

    Args:
        module: An SDFTModule, configured, on its device.
        data: Its data module, set up for `fit`.
        rows: Size of the sample.
        seed: Which rows it holds.
        max_length: Longest sequence that the model takes, in tokens.
        accumulate: Micro-batches of an optimizer step.

    Returns:
        The report.

    Raises:
        UserError: If fewer than two rows are asked for or there.
    """
    known = data.training_rows()
    if rows < 2 or len(known) < 2:
        raise UserError(
            f"preflight.rows: got {rows} of {len(known)} training rows, 2 and more are needed: a "
            "row is compared with another."
        )
    sample = random.Random(seed).sample(known, min(rows, len(known)))
    swapped = [
        # With its own context the teacher would still read the right answer there.
        row._replace(demonstration=other.demonstration, context=other.context)
        for row, other in zip(sample, _others(sample), strict=True)
    ]
    size = data.eval_batch_size
    batches = [data.batch_of(sample[i : i + size]) for i in range(0, len(sample), size)]
    strangers = [data.batch_of(swapped[i : i + size]) for i in range(0, len(sample), size)]
    teacher = module.teacher.network
    grade = _grading(data, sample)
    student_role, _ = _role(module, module.student, batches, False, grade)
    teacher_role, own_scores = _role(module, teacher, batches, True, grade)
    other_role, other_scores = _role(module, teacher, strangers, True, grade)
    pairs = list(zip(own_scores, other_scores, strict=True))
    kl, agreement = _divergence(module, batches)
    kl_of_manner, _ = _divergence(module, strangers)
    prompt, teacher_prompt, demonstration, left_out = data.training_lengths()
    step_seconds, memory = _step(module, data, sample, accumulate)
    return Report(
        len(sample),
        student_role,
        teacher_role,
        other_role,
        _demonstrations_right(module, data, known),
        sum(own > other for own, other in pairs),
        sum(own < other for own, other in pairs),
        kl,
        kl_of_manner,
        agreement,
        prompt,
        teacher_prompt,
        demonstration,
        left_out,
        data.too_long,
        module.sampling.max_new_tokens,
        max_length,
        step_seconds,
        memory,
        _retaining_options(module, data),
    )


def _retaining_options(module: Any, data: TrainingData) -> list[str]:
    """The options that add rows to retain; none where there are such rows already."""
    if data.retained_new_tokens:
        return []
    copy = ["--model.initial_copy=true"] if module.retained_rows.needs_copy else []
    return ["--data.retain=example:retain/prompts.jsonl", *copy]


def _others(sample: list[Demonstration]) -> list[Demonstration]:
    """For each row another one of which the teacher cannot learn the right answer.

    The next with another demonstration, reference and context, as several rows may tell the same
    fact. Where there is none, the next with another demonstration and reference (all rows may share
    one source text); failing that, another context; failing that, the next.
    """
    found = []
    for place, row in enumerate(sample):
        rest = [*sample[place + 1 :], *sample[:place]]
        # Of equals max takes the first, which is the next row.
        found.append(max(rest, key=partial(_unlike, row)))
    return found


def _unlike(row: Demonstration, other: Demonstration) -> tuple[bool, bool]:
    """Whether another row has another demonstration and reference, and another context."""
    told = demonstration_text(other) != demonstration_text(row)
    return told and other.reference != row.reference, other.context != row.context


def _grading(data: TrainingData, sample: list[Demonstration]) -> Grading | None:
    name = data.grader
    without = sum(row.reference is None for row in sample)
    if name is None or without == len(sample):
        return None
    if without:
        log.warning(
            f"preflight: {without} of {len(sample)} sampled rows have no reference and are not "
            "graded; the accuracies are of the others."
        )

    def grade(texts: Sequence[str], rows: Sequence[Demonstration]) -> list[float]:
        known = [place for place, row in enumerate(rows) if row.reference is not None]
        scores = [math.nan] * len(rows)
        found = grade_rows(
            name, [texts[place] for place in known], [rows[place] for place in known], data.judge
        )
        for place, score in zip(known, found, strict=True):
            scores[place] = score
        return scores

    return grade


def _demonstrations_right(
    module: Any, data: TrainingData, known: list[Demonstration]
) -> float | None:
    """How many demonstrations the grader finds right in their own rows, as a fraction."""
    rows = [row for row in known if row.reference is not None and row.demonstration]
    if data.grader is None or data.grader in JUDGED or not rows:
        return None
    texts = [demonstration_text(row) for row in rows]
    if not data.grade_thoughts:
        texts = [module.evaluator.reader.answer(text) for text in texts]
    return gold_self_test(data.grader, [row.reference for row in rows], texts).passed / len(rows)


def _role(
    module: Any,
    model: Any,
    batches: list[PromptBatch],
    as_teacher: bool,
    grade: Grading | None,
) -> tuple[Role, list[float]]:
    """How a role does, and its score in each row (none where nothing is graded)."""
    scores: list[float] = []
    truncated = artifacts = copied = count = 0
    for batch in batches:
        prompts = batch.teacher_prompts if as_teacher else batch.prompts
        rollout = module.evaluator.greedy_completions(model, prompts.to(module.device))
        truncated += int(rollout.truncated.sum())
        texts = module.evaluator.decode(rollout)
        if grade is not None:
            scores += grade(module.evaluator.answers(texts, prompts), batch.rows)
        for row, text in zip(batch.rows, texts, strict=True):
            shown = demonstration_text(row)
            count += 1
            artifacts += bool(ARTIFACTS.search(text)) and not ARTIFACTS.search(shown)
            copied += _copies(text, shown)
    low = high = accuracy = None
    judged = [score for score in scores if not math.isnan(score)]
    if judged:
        accuracy = sum(judged) / len(judged)
        low, high = wilson_interval(sum(judged), len(judged))
    role = Role(accuracy, low, high, truncated / count, artifacts / count, copied / count)
    return role, scores


def _copies(text: str, shown: str) -> bool:
    """Whether a completion holds the whole demonstration, or is all of it."""
    text, shown = (" ".join(part.casefold().split()) for part in (text, shown))
    return bool(text) and bool(shown) and (shown in text or text in shown)


@torch.no_grad()
def _divergence(module: Any, batches: list[PromptBatch]) -> tuple[float, float]:
    """KL(teacher ‖ student) on completions that the student samples; agreement at their start."""
    kl: list[float] = []
    first: list[float] = []
    for number, batch in enumerate(batches):
        batch = _moved(batch, module.device)
        (rollout,) = module.sample_rollouts([batch], number)
        keep = rollout.completion_mask  # (R, T)
        student = module.student_hidden(batch, rollout, keep)  # (N, D)
        teacher = module.teacher_hidden(batch, rollout, keep)  # (N, D)
        _, tokens = module.token_divergence(student, teacher, rollout, keep)
        kl += tokens.kl.tolist()
        starts = keep.sum(dim=1).cumsum(0) - keep.sum(dim=1)  # (R,) first token of each row
        first += tokens.top1_agreement[starts].tolist()
    return sum(kl) / len(kl), sum(first) / len(first)


def _step(
    module: Any, data: TrainingData, sample: list[Demonstration], accumulate: int
) -> tuple[float, float]:
    """Seconds and gigabytes of an optimizer step, from one micro-batch forward and backward."""
    rows = [sample[i % len(sample)] for i in range(data.batch_size)]
    # The same row twice would be sampled twice alike; the ids tell them apart.
    rows = [row._replace(id=f"{row.id}#{i}") for i, row in enumerate(rows)]
    batch = _moved(data.batch_of(rows), module.device)
    if module.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(module.device)
    module.student.train()
    start = time.perf_counter()
    (rollout,) = module.sample_rollouts([batch], 0)
    keep = module.loss_mask(batch, rollout)
    student = module.student_hidden(batch, rollout, keep)
    teacher = module.teacher_hidden(batch, rollout, keep)
    loss, _ = module.token_divergence(student, teacher, rollout, keep)
    loss.backward()
    float(loss.detach())  # waits for the device
    seconds = (time.perf_counter() - start) * accumulate
    trained = [p for p in module.student.parameters() if p.requires_grad]
    averages = sum(2 * p.numel() * p.element_size() for p in trained)
    for parameter in trained:
        parameter.grad = None
    return seconds, (_peak_bytes(module.device) + averages) / 1e9


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _moved(batch: PromptBatch, device: torch.device) -> PromptBatch:
    moved: dict[str, Any] = {
        name: value.to(device)
        for name, value in batch._asdict().items()
        if isinstance(value, torch.Tensor)
    }
    return batch._replace(**moved)
