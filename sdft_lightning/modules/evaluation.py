"""Evaluation that all methods share: greedy answers, their grades, and benchmarks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.files.run_folder import ItemKey
from sdft_lightning.files.texts import digest
from sdft_lightning.graders import Judge, Usage, grade_rows
from sdft_lightning.graders.metrics import NamedMetrics, TaskAccuracy, WeightedMean
from sdft_lightning.graders.texts import AnswerShape, answer_shape
from sdft_lightning.models.chat_template import AnswerReader
from sdft_lightning.modules.capability import (
    CapabilityScores,
    CapabilityTrack,
    PairedTrack,
    of_all_ranks,
)
from sdft_lightning.rollout import greedy_rollout
from sdft_lightning.rollout.sampling import MOST_NEW_TOKENS
from sdft_lightning.types import (
    Demonstration,
    GenerationBatch,
    Items,
    Measurement,
    PromptBatch,
    Rollout,
    ScoringBatch,
    Tokens,
    task_data,
)

if TYPE_CHECKING:
    from sdft_lightning.modules.base import PolicyModule

log = logging.getLogger(__name__)

EvaluationBatch = PromptBatch | ScoringBatch | GenerationBatch


@dataclass(frozen=True)
class Evaluation:
    """How answers are measured in validation, test and predict.

    Args:
        max_new_tokens: Longest completion; completions are greedy.
        teacher_in_fit: Grade also the teacher in the validations of a fit; the commands validate
            and test always do.
        compare_with: Compare each graded set and benchmark item by item with what this run
            measured: its folder, or a file item_scores.jsonl in it. Without it the base is what
            the run itself measured before its first step.
    """

    max_new_tokens: int = 1024
    teacher_in_fit: bool = False
    compare_with: str | None = None

    def __post_init__(self) -> None:
        """Refuse lengths out of range."""
        if not 1 <= self.max_new_tokens <= MOST_NEW_TOKENS:
            raise UserError(
                f"model.evaluation.max_new_tokens: got {self.max_new_tokens}, allowed are 1 and "
                f"more, up to {MOST_NEW_TOKENS}."
            )


class Graded(NamedTuple):
    """Completions of validation rows and their scores; `scores` is empty where ungraded."""

    task: str
    rows: list[Demonstration]
    completions: list[str]
    scores: list[float]
    truncated: list[bool]


class _ScoredAnswer(NamedTuple):
    """A graded answer: of which set and metric, to which row, and a digest of what was asked."""

    key: ItemKey
    row_id: str
    score: float
    asked: str


def _items(answers: list[_ScoredAnswer]) -> dict[ItemKey, Items]:
    """The scores of graded answers by set and metric, in the order of the rows' ids."""
    by_key: dict[ItemKey, list[_ScoredAnswer]] = {}
    for answer in sorted(answers, key=lambda each: (each.key, each.row_id)):
        by_key.setdefault(answer.key, []).append(answer)
    found: dict[ItemKey, Items] = {}
    for key, each in by_key.items():
        content = digest([answer.asked for answer in each])
        found[key] = Items({answer.row_id: answer.score for answer in each}, content)
    return found


class Evaluator:
    """Answers questions greedily and grades the answers; responds to benchmarks.

    A module calls `begin` before the first batch of a validation or test, `graded` or `respond` for
    each batch, and `log_scores` after the last one. Its `predict_step` calls `predictions` only.

    Args:
        module: Whose student answers.
        options: How.

    Attributes:
        accuracies: Of the tasks that were graded since the last `log_scores`.
        shapes: Mean words and distinctness of the student's answers to these.
        capability: When the benchmarks are measured, and what they were before training.
        items: What was measured in the last validation or test, item by item.
        paired: How that compares with the items before training.
    """

    def __init__(self, module: PolicyModule, options: Evaluation) -> None:
        self.options = options
        self.accuracies = NamedMetrics(TaskAccuracy)
        self.shapes = NamedMetrics(WeightedMean)
        self.capability = CapabilityTrack()
        self.items: dict[ItemKey, Items] = {}
        self.paired = PairedTrack(options.compare_with)
        self._answers: list[_ScoredAnswer] = []
        self._scores = CapabilityScores()
        self._module = module
        self._reader: AnswerReader | None = None

    def begin(self) -> None:
        """Decide whether the benchmarks are due."""
        self.capability.begin(self._module.trainer)

    def greedy_completions(self, model: Any, prompts: Tokens) -> Rollout:
        """The likeliest completions under `model`, with sampling weights where they are faster.

        Args:
            model: The student, or another model of its kind.
            prompts: `(B, P)`, padded on the left.
        """
        module = self._module
        if model is module.student:
            model = module.passes.sampler()
        return greedy_rollout(
            model,
            prompts,
            self.options.max_new_tokens,
            module.stop_ids,
            module.tokenizer.pad_token_id,
        )

    @property
    def reader(self) -> AnswerReader:
        """What makes text of the student's tokens."""
        reader, belongs = self._reader, (self._module.tokenizer, self._module.stop_ids)
        if reader is None or (reader.tokenizer, reader.stop_ids) != belongs:
            self._reader = reader = AnswerReader(*belongs)
        return reader

    def decode(self, rollout: Rollout) -> list[str]:
        """Texts of the R completions: all that was said, thoughts and tool calls included."""
        return [
            self.reader.text(ids[mask].tolist())
            for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)
        ]

    def answers(self, completions: list[str], prompts: Tokens) -> list[str]:
        """What graders get: the completions without thoughts, unless `data.grade_thoughts` is set.

        Args:
            completions: One text a prompt.
            prompts: `(B, P)`, padded on the left; they may open a thought.
        """
        data = task_data(self._module.trainer)
        if data is not None and data.grade_thoughts:
            return completions
        return [
            self.reader.answer(text, self.reader.opened(ids))
            for text, ids in zip(completions, prompts.lists(), strict=True)
        ]

    def graded(self, model: Any, prompts: Tokens, batch: PromptBatch, metric: str) -> Graded:
        """Complete prompts, grade the answers, and count the grades under the name `metric`.

        Args:
            model: Who answers: the student, or its teacher.
            prompts: `(B, P)` what it is shown, padded on the left.
            batch: The B rows, their task and its grader.
            metric: accuracy or teacher_accuracy.
        """
        rollout = self.greedy_completions(model, prompts)
        completions = self.decode(rollout)
        scores: list[float] = []
        if batch.grader:
            answers = self.answers(completions, prompts)
            scores = grade_rows(batch.grader, answers, batch.rows, self._judge)
            accuracy = self.accuracies.of(f"{batch.task}/{metric}", self._module.device)
            accuracy.update(scores)
            if metric == "accuracy":
                self._count_shapes(batch.task, answers)
            key = ItemKey("task", batch.task, metric)
            self._answers += [
                _ScoredAnswer(key, row.id, score, digest([row.id, row.prompt, row.reference]))
                for row, score in zip(batch.rows, scores, strict=True)
            ]
        return Graded(batch.task, batch.rows, completions, scores, rollout.truncated.tolist())

    def _count_shapes(self, task: str, answers: list[str]) -> None:
        """Count how long the student's answers are, and how much of them is said once."""
        found = [answer_shape(each) for each in answers]
        shapes = torch.tensor(found, dtype=torch.float32)  # (B, 2); see `TaskAccuracy`
        for name, mean in zip(AnswerShape._fields, shapes.mean(dim=0), strict=True):
            counted = self.shapes.of(f"{task}/answer_{name}", self._module.device)
            counted.update(mean.to(self._module.device), len(answers))

    def respond(self, batch: ScoringBatch | GenerationBatch) -> None:
        """Respond to the requests of a benchmark, where they are due."""
        if self.capability.due:
            self._scores.respond(self._module, batch)

    def predictions(self, batch: PromptBatch) -> list[dict[str, Any]]:
        """Answer the questions of a batch greedily, one record for each row."""
        student = self._module.student
        rollout = self.greedy_completions(student, batch.prompts)
        texts = self.decode(rollout)
        answers = self.answers(texts, batch.prompts)
        truncated = rollout.truncated.tolist()
        return [
            {
                "id": row.id,
                "prompt": row.prompt,
                "completion": text,
                # Only of completions with thoughts.
                **({} if answer == text else {"answer": answer}),
                "truncated": cut,
            }
            for row, text, answer, cut in zip(batch.rows, texts, answers, truncated, strict=True)
        ]

    def log_scores(self, stage: str) -> None:
        """Log the accuracy of each task with its 95 % interval, and the benchmarks.

        All ranks must call this together.

        Args:
            stage: val or test.
        """
        module = self._module
        if self._judge is not None:
            log_usage(module, self._judge, stage)
        for name, accuracy in self.accuracies.compute(module.device).items():
            if accuracy is None:  # a judge gave no verdict on any answer
                continue
            for suffix, value in zip(("", "_low", "_high"), accuracy, strict=True):
                module.log(f"{stage}/task/{name}{suffix}", value, rank_zero_only=False)
        for name, mean in self.shapes.compute(module.device).items():
            module.log(f"{stage}/task/{name}", mean, rank_zero_only=False)
        data = task_data(module.trainer)
        suite = None if data is None else data.benchmark_suite
        measured: dict[str, Measurement] = {}
        if suite is not None and self.capability.due:
            measured = self._scores.take(suite)
            for name, value in self.capability.record(
                measured, module.trainer, suite.fingerprint
            ).items():
                module.log(f"{stage}/capability/{name}", value, rank_zero_only=False)
        self._log_paired(stage, measured)

    def _log_paired(self, stage: str, benchmarks: dict[str, Measurement]) -> None:
        """Keep the scores of single items, and log how they compare with the base's."""
        module, trainer = self._module, self._module.trainer
        mine, self._answers, self.items = self._answers, [], {}
        if trainer.sanity_checking:  # a few batches are no measurement
            return
        for name, measurement in benchmarks.items():
            task, _, metric = name.rpartition("/")
            if measurement.items is not None:
                self.items[ItemKey("capability", task, metric)] = measurement.items
        self.items |= _items(of_all_ranks(mine))
        in_fit = trainer.state.fn == "fit"
        for name, value in self.paired.compare(self.items, trainer, in_fit).items():
            module.log(f"{stage}/paired/{name}", value, rank_zero_only=False)

    @property
    def _judge(self) -> Judge | None:
        """Who is asked by the graders that ask: the data module knows."""
        data = task_data(self._module.trainer)
        return None if data is None else data.judge


def log_usage(module: L.LightningModule, judge: Judge, stage: str) -> None:
    """Log `<stage>/judge/...` over all ranks, and tell this rank's share in one line.

    Args:
        module: Logs it; called on every rank, at the end of a validation or test.
        judge: Was asked.
        stage: val or test.
    """
    usage = judge.take_usage()
    cost = judge.cost(usage)
    counts: dict[str, float] = {
        "answers": usage.judged + usage.unjudged,
        "cached": usage.cached,
        "unjudged": usage.unjudged,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
    }
    if cost is not None:
        counts["cost"] = cost
    for name, value in counts.items():
        module.log(f"{stage}/judge/{name}", float(value), reduce_fx="sum", sync_dist=True)
    if usage.judged + usage.unjudged:
        log.info(usage_line(judge, usage, cost))


def usage_names(judge: Judge) -> list[str]:
    """What `log_usage` logs of a judge."""
    names = ["answers", "cached", "unjudged", "input_tokens", "output_tokens"]
    return names if judge.cost(Usage()) is None else [*names, "cost"]


def usage_line(judge: Judge, usage: Usage, cost: float | None) -> str:
    """One line on what was asked."""
    line = (
        f"judge {judge.settings.model}: {usage.judged} answers judged, {usage.cached} of them from "
        f"the cache, {usage.unjudged} without a verdict; {usage.input_tokens} tokens sent, "
        f"{usage.output_tokens} received"
    )
    return line if cost is None else f"{line}; cost {cost:.4f}"
