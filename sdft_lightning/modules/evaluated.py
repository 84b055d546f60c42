"""Evaluation that all methods share: graded answers, and the requests of benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.graders import Judge, grade_rows
from sdft_lightning.graders.metrics import NamedMetrics, TaskAccuracy
from sdft_lightning.models.chat_template import AnswerReader
from sdft_lightning.modules.capability import CapabilityScores, CapabilityTrack
from sdft_lightning.modules.judging import log_usage
from sdft_lightning.modules.timing import TimedModule
from sdft_lightning.rollout import StudentPasses, greedy_rollout
from sdft_lightning.rollout.sampling import MOST_NEW_TOKENS
from sdft_lightning.rollout.student import SamplingDtype
from sdft_lightning.types import (
    Demonstration,
    GenerationBatch,
    PromptBatch,
    Rollout,
    ScoringBatch,
    Tokens,
    task_data,
)

EvaluationBatch = PromptBatch | ScoringBatch | GenerationBatch


class Graded(NamedTuple):
    """Completions of validation rows and their scores; `scores` is empty where ungraded."""

    task: str
    rows: list[Demonstration]
    completions: list[str]
    scores: list[float]
    truncated: list[bool]


class EvaluatedModule(TimedModule):
    """Answers questions greedily and grades the answers; responds to benchmarks.

    Args:
        eval_max_new_tokens: Longest completion.
        sampling_dtype: Weights to sample with: same, a bfloat16 copy, or auto.

    Attributes:
        student: The model being trained; None until `configure_model`.
        tokenizer: The student's.
        stop_ids: Tokens that end a completion.
    """

    student: Any

    def __init__(self, eval_max_new_tokens: int, sampling_dtype: SamplingDtype) -> None:
        super().__init__()
        if not 1 <= eval_max_new_tokens <= MOST_NEW_TOKENS:
            raise UserError(
                f"model.eval_max_new_tokens: got {eval_max_new_tokens}, allowed are 1 and more, "
                f"up to {MOST_NEW_TOKENS}."
            )
        self.eval_max_new_tokens = eval_max_new_tokens
        # Before any teacher, so that a checkpoint numbers the optimizer's parameters alike whether
        # it was written under fsdp2, which counts those of the whole module, or not.
        self.register_module("student", None)
        self.tokenizer: Any = None
        self.stop_ids: list[int] = []
        self._reader: AnswerReader | None = None
        self._passes = StudentPasses(sampling_dtype)
        self.accuracies = NamedMetrics(TaskAccuracy)
        self.capability = CapabilityTrack()
        self._capability_scores = CapabilityScores()

    @property
    def passes(self) -> StudentPasses:
        """The student's passes on its present weights."""
        step = 0 if self._trainer is None else self._trainer.global_step
        return self._passes.at(self.student, step)

    def gather_student(self) -> Any:
        """The student as a model that this process can call alone, not to be trained.

        Under fsdp2 this is the copy to sample with. Where the weights have moved since it was
        last brought up to date, this takes all processes at once.
        """
        return self.passes.whole()

    def gather(self) -> None:
        """Bring the whole copies up to date on all processes at once, before they go their ways."""
        self.gather_student()

    def greedy_completions(self, model: Any, prompt_ids: Tensor, prompt_mask: Tensor) -> Rollout:
        """The likeliest completions under `model`, with sampling weights where they are faster.

        Args:
            model: The student, or another model of its kind.
            prompt_ids: `(B, P)`, padded on the left.
            prompt_mask: `(B, P)`.
        """
        if model is self.student:
            model = self.passes.sampler()
        return greedy_rollout(
            model,
            Tokens(prompt_ids, prompt_mask),
            self.eval_max_new_tokens,
            self.stop_ids,
            self.tokenizer.pad_token_id,
        )

    def decode(self, rollout: Rollout) -> list[str]:
        """Texts of the R completions: all that was said, thoughts and tool calls included."""
        return [
            self.reader.text(ids[mask].tolist())
            for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)
        ]

    @property
    def reader(self) -> AnswerReader:
        """What makes text of the student's tokens."""
        reader = self._reader
        if reader is None or (reader.tokenizer, reader.stop_ids) != (self.tokenizer, self.stop_ids):
            self._reader = reader = AnswerReader(self.tokenizer, self.stop_ids)
        return reader

    def answers(self, completions: list[str], prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
        """What graders get: the completions without thoughts, unless `data.grade_thoughts` is set.

        Args:
            completions: One text a prompt.
            prompt_ids: `(B, P)`, padded on the left; they may open a thought.
            prompt_mask: `(B, P)`.
        """
        data = task_data(self.trainer)
        if data is not None and data.grade_thoughts:
            return completions
        return [
            self.reader.answer(text, self.reader.opened(ids[mask.bool()].tolist()))
            for text, ids, mask in zip(completions, prompt_ids, prompt_mask, strict=True)
        ]

    def graded_completions(
        self, model: Any, prompt_ids: Tensor, prompt_mask: Tensor, batch: PromptBatch, metric: str
    ) -> Graded:
        """Complete, grade and count a batch under the name `metric`."""
        rollout = self.greedy_completions(model, prompt_ids, prompt_mask)
        completions = self.decode(rollout)
        scores: list[float] = []
        if batch.grader:
            answers = self.answers(completions, prompt_ids, prompt_mask)
            scores = grade_rows(batch.grader, answers, batch.rows, self._judge)
            self.accuracies.of(f"{batch.task}/{metric}", self.device).update(scores)
        return Graded(batch.task, batch.rows, completions, scores, rollout.truncated.tolist())

    def validation_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Grade the answers to questions, and respond to the requests of benchmarks."""
        if isinstance(batch, PromptBatch):
            return self.grade(batch)
        if self.capability.due:
            self._capability_scores.respond(self, batch)
        return {}

    def grade(self, batch: PromptBatch) -> dict[str, Any]:
        """Answer the questions of a batch greedily and grade the answers."""
        graded = self.graded_completions(
            self.student, batch.prompt_ids, batch.prompt_mask, batch, "accuracy"
        )
        return {"graded": graded}

    def test_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """As `validation_step`."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        """Decide whether the benchmarks are due."""
        self.gather()
        self.capability.begin(self.trainer)

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self.gather()
        self.capability.begin(self.trainer)

    def on_predict_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self.gather()

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy of each task with its 95 % interval, and the benchmarks."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_scores("test")

    @property
    def _judge(self) -> Judge | None:
        """Who is asked by the graders that ask: the data module knows."""
        data = task_data(self.trainer)
        return None if data is None else data.judge

    def _log_scores(self, stage: str) -> None:
        if self._judge is not None:
            log_usage(self, self._judge, stage)
        for name, accuracy in self.accuracies.compute(self.device).items():
            if accuracy is None:  # a judge gave no verdict on any answer
                continue
            for suffix, value in zip(("", "_low", "_high"), accuracy, strict=True):
                self.log(f"{stage}/task/{name}{suffix}", value, rank_zero_only=False)
        data = task_data(self.trainer)
        suite = None if data is None else data.benchmark_suite
        if suite is not None and self.capability.due:
            measured = self._capability_scores.take(suite)
            for name, value in self.capability.record(
                measured, self.trainer, suite.fingerprint
            ).items():
                self.log(f"{stage}/capability/{name}", value, rank_zero_only=False)

    def predict_step(
        self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Answer the questions of a batch greedily."""
        rollout = self.greedy_completions(self.student, batch.prompt_ids, batch.prompt_mask)
        texts = self.decode(rollout)
        answers = self.answers(texts, batch.prompt_ids, batch.prompt_mask)
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
