"""Self-Distillation Fine-Tuning (METHOD §1, arXiv 2601.19897)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning as L
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.losses.masking import loss_mask, sequence_weights
from sdft_lightning.models.sharding import is_sharded
from sdft_lightning.models.tokenization import token_id
from sdft_lightning.modules.base import PolicyModule
from sdft_lightning.modules.rollouts import Rollouts
from sdft_lightning.modules.run_callbacks import SamplerWatch, TeacherUpdate
from sdft_lightning.rollout import Engine, Sampling, StudentPasses, TransformersEngine
from sdft_lightning.rollout.mismatch import Mismatch
from sdft_lightning.teacher import EMATeacher, FrozenTeacher, Teacher
from sdft_lightning.types import (
    Demonstration,
    PromptBatch,
    Rollout,
    TaskData,
    Tokens,
    TokenStatistics,
)

log = logging.getLogger(__name__)

# Enough of a prompt's end to hold the assistant header.
_HEADER_TOKENS = 8

# Shown by --print_config as classes with their arguments; each module makes its own from them.
_DEFAULT_TEACHER = lazy_instance(EMATeacher, update_rate=0.01)
_DEFAULT_ENGINE = lazy_instance(TransformersEngine)


class SDFTModule(PolicyModule):
    """The student answers the bare question and is pulled toward what its teacher would say.

    - Text: the student answers the bare question, on-policy.
    - Teacher: an average of the student, or another `teacher`, that sees the demonstration.
    - Compared: both distributions at each token of the answer, by `divergence`.

    Args:
        sampling: How completions are sampled; its temperature is also that of the loss.
        teacher: EMATeacher (default), FrozenTeacher or LiveTeacher.
        divergence: What is minimised at each token.
        num_loss_tokens_to_skip: Tokens at the start of each answer that the loss leaves out.
        generate_from_teacher: Sample the completions from the teacher instead; not on-policy.
        engine: Who samples in training: TransformersEngine (default), VLLMEngine or
            VLLMServerEngine; evaluation is always done by transformers.
        mismatch: What is done about an engine whose probabilities are not quite the student's.
        kwargs: `PolicyModule`'s.

    Attributes:
        rollouts: Samples the completions.
    """

    has_preflight: ClassVar[bool] = True
    has_graded_teacher: ClassVar[bool] = True
    # Why completions may not be the student's own, for messages.
    other_writer: ClassVar[str] = "model.generate_from_teacher is true: the teacher samples"

    def __init__(
        self,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        teacher: Teacher = _DEFAULT_TEACHER,
        divergence: Divergence = Divergence(),  # noqa: B008 - frozen
        num_loss_tokens_to_skip: int = 0,
        generate_from_teacher: bool = False,
        engine: Engine = _DEFAULT_ENGINE,
        mismatch: Mismatch = Mismatch(),  # noqa: B008 - frozen
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_loss_tokens_to_skip < 0:
            raise UserError(
                f"model.num_loss_tokens_to_skip: got {num_loss_tokens_to_skip}, allowed are 0 and "
                "more."
            )
        if num_loss_tokens_to_skip >= sampling.max_new_tokens:
            raise UserError(
                f"model.num_loss_tokens_to_skip: got {num_loss_tokens_to_skip}, and completions "
                f"have at most {sampling.max_new_tokens} tokens (model.sampling.max_new_tokens): "
                "no token would be left to learn from. Lower the one or raise the other."
            )
        self.sampling = sampling
        engine = TransformersEngine() if engine is _DEFAULT_ENGINE else engine
        self.rollouts = Rollouts(self, sampling, engine, mismatch)
        self.teacher = EMATeacher(0.01) if teacher is _DEFAULT_TEACHER else teacher
        self.divergence = divergence
        self.num_loss_tokens_to_skip = num_loss_tokens_to_skip
        self.generate_from_teacher = generate_from_teacher
        if generate_from_teacher and self.rollouts.compares:
            raise UserError(
                "model.generate_from_teacher: the teacher samples with the TransformersEngine and "
                "without model.mismatch.correction only; both are about the student. Leave them "
                "out, or sample from the student."
            )
        if divergence.estimator == "sampled_token":
            self._check_sampled_token()
        self._teacher_passes = StudentPasses("same")
        self._told_empty = False

    # --- the step -------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One step of METHOD §1: sample, score under both roles, compare, average."""
        rollout = self.rollout(batch)
        keep = self.loss_mask(batch, rollout)  # (R, T)
        student = self.student_hidden(batch, rollout, keep)  # (N, D)
        teacher = self.teacher_hidden(batch, rollout, keep)  # (N, D), no gradient
        correction = self.rollouts.correction(student, rollout, keep)  # (N,)
        loss, tokens = self.token_divergence(student, teacher, rollout, keep, correction)
        loss = self.retained_rows.beside(loss, batch)  # rows to retain, where there are any
        self.log_step(loss, tokens, rollout, keep)
        return {"loss": loss, "rollout": rollout, "keep": keep, "divergence": tokens.divergence}

    def rollout(self, batch: PromptBatch) -> Rollout:
        """Completions of a micro-batch, sampled together with its whole accumulation window."""
        with self.timing.timed("rollout"):
            return self.rollouts.take(batch, self.sample_rollouts)

    def sample_rollouts(self, batches: list[PromptBatch], step: int) -> list[Rollout]:
        """The text of several micro-batches, sampled at once: the student's, or the teacher's.

        Args:
            batches: Micro-batches of one accumulation window.
            step: Optimizer step.
        """
        if not self.generate_from_teacher:
            return self.rollouts.of_student(batches, step)
        prompts = [self.teacher_prompts(batch) for batch in batches]
        return self.rollouts.of_teacher(self.gather_teacher(), prompts, batches, step)

    def teacher_prompts(self, batch: PromptBatch) -> Tokens:
        """What `(B, Q)` the teacher sees: question and demonstration."""
        return batch.teacher_prompts

    def loss_mask(self, batch: PromptBatch, rollout: Rollout) -> Tensor:
        """`(R, T)` the completion tokens that count, see `masking.loss_mask`."""
        header = self.tokenizer.decode(batch.prompt_ids[0, -_HEADER_TOKENS:])
        opens_thinking = "<think>" in header and "</think>" not in header
        return loss_mask(
            rollout.completion_ids,
            rollout.completion_mask,
            self.num_loss_tokens_to_skip,
            token_id(self.tokenizer, "</think>"),
            opens_thinking,
            token_id(self.tokenizer, "<think>"),
        )

    def student_hidden(self, batch: PromptBatch, rollout: Rollout, keep: Tensor) -> Tensor:
        """The student's hidden states `(N, D)` at the kept tokens."""
        with self.timing.timed("student"):
            return self.passes.hidden(batch.prompts, rollout.completions, keep)

    def teacher_hidden(self, batch: PromptBatch, rollout: Rollout, keep: Tensor) -> Tensor:
        """The teacher's hidden states `(N, D)` at the same tokens after its own prompt."""
        with self.timing.timed("teacher"):
            hidden: Tensor = self.teacher(self.teacher_prompts(batch), rollout.completions, keep)
            return hidden

    def token_divergence(
        self,
        student: Tensor,
        teacher: Tensor,
        rollout: Rollout,
        keep: Tensor,
        correction: Tensor | None = None,
    ) -> tuple[Tensor, TokenStatistics]:
        """Mean over the tokens of each completion, then over completions, of the divergence."""
        weights = sequence_weights(keep)[keep]  # (N,)
        if correction is not None:
            weights = weights * correction
        with self.timing.timed("divergence"):
            return bounded_divergence(
                teacher,
                self.teacher.gather_head(),
                student,
                self.gather_head(),
                rollout.completion_ids[keep],  # (N,)
                weights,
                self.divergence,
                self.sampling.temperature,
            )

    def log_step(
        self, loss: Tensor, tokens: TokenStatistics, rollout: Rollout, keep: Tensor
    ) -> None:
        """Add what a micro-batch of on-policy distillation shows to what the step will log.

        Args:
            loss: Scalar.
            tokens: Of the N kept tokens.
            rollout: What was sampled.
            keep: `(R, T)` the tokens in the loss.
        """
        if not tokens.kl.numel() and not self._told_empty:
            self._told_empty = True
            log.warning(
                f"step {self.trainer.global_step + 1}: no token of a micro-batch is in the loss, "
                "as all of its completions end within model.num_loss_tokens_to_skip tokens; it "
                "counts as loss 0. This is told once."
            )
        self.step_values.update("loss", loss)
        weights = self.retained_rows.weights_of_log(keep)  # (N,)
        for name in ("kl", "student_entropy", "teacher_entropy", "top1_agreement"):
            self.step_values.update(name, getattr(tokens, name), weights)
        mask = rollout.completion_mask  # (R, T)
        self.step_values.update("completion_length", mask.sum(dim=1))
        self.step_values.update("truncated_fraction", rollout.truncated)
        self.step_values.update_bigrams("distinct_2", rollout.completion_ids, mask)
        self.completion_tokens = int(mask.sum()) + self.retained_rows.tokens

    # --- the teacher ----------------------------------------------------------------------------

    def load_teacher(self) -> None:
        """Make the teacher from the student, before any training."""
        self.teacher.copy_from(self.student)

    @property
    def teacher_before_training(self) -> Teacher | None:
        """The teacher itself, where it never moves."""
        return self.teacher if isinstance(self.teacher, FrozenTeacher) else None

    def shard_models(self, mesh: Any) -> None:
        """Spread both models over processes; the teacher, too, is asked for whole completions."""
        self._teacher_passes.prepare(self.teacher.network)
        super().shard_models(mesh)

    def forget_copies(self) -> None:
        """Drop what was copied from the weights of student and teacher."""
        super().forget_copies()
        self.rollouts.forget()
        self._teacher_passes.forget()

    def gather_teacher(self) -> Any:
        """The teacher as a model that this process can call alone, to sample or to be graded.

        Where the teacher is spread over processes and its weights have moved, this takes all
        processes at once.
        """
        if self.teacher.network is self.student:
            return self.gather_student()
        # A frozen teacher is gathered once, and the processes need not ask for it together again.
        step = 0 if isinstance(self.teacher, FrozenTeacher) else self.trainer.global_step
        return self._teacher_passes.at(self.teacher.network, step).whole()

    def gather(self) -> None:
        """Gather the student's weights, and the teacher's where it will be graded."""
        super().gather()
        if is_sharded(self.student) and self.grades_teacher:
            self.gather_teacher()

    def uses_teacher(self, command: str, data: TaskData | None) -> bool:
        """In a fit, and where questions are graded that the teacher answers, too."""
        if command in ("validate", "test") and data is not None:
            return any(map(self._is_shown, data.graded(command).values()))
        return command not in ("predict", "export")

    def _is_shown(self, taught: bool) -> bool:
        """Whether the teacher answers questions, with demonstrations or without."""
        return taught or not self.row_needs.demonstration

    def grades_in_fit(self, taught: bool) -> bool:
        """Where it is asked for, and the teacher has something to read."""
        return self.evaluation.teacher_in_fit and self._is_shown(taught)

    @property
    def grades_teacher(self) -> bool:
        """Whether the running command grades the teacher beside the student."""
        return self.evaluation.teacher_in_fit or self.trainer.state.fn != "fit"

    def grade(self, batch: PromptBatch) -> dict[str, Any]:
        """Grade the student's answers; in validate and test also the teacher's."""
        outputs = super().grade(batch)
        prompts = self.teacher_prompts(batch)  # (B, Q)
        taught = prompts.mask.any(dim=1)  # (B,) rows with a demonstration
        if batch.grader and taught.any() and self.grades_teacher:
            rows = [row for row, shown in zip(batch.rows, taught.tolist(), strict=True) if shown]
            outputs["teacher"] = self.evaluator.graded(
                self.gather_teacher(),
                prompts.rows(taught),
                batch._replace(rows=rows),
                "teacher_accuracy",
            )
        return outputs

    # --- what a run asks ------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """The teacher moves after each optimizer step, before any checkpoint is written.

        The sampler is watched where it is compared.
        """
        watch = [SamplerWatch(self.rollouts.mismatch)] if self.rollouts.compares else []
        return [TeacherUpdate(), *watch, *super().configure_callbacks()]

    def _check_sampled_token(self) -> None:
        """Refuse the estimate from the sampled token where it is not the student's own draw.

        Raises:
            UserError: If another wrote the completions, or tokens were left out while sampling.
        """
        named = "model.divergence.estimator: got sampled_token, which estimates KL(student ‖ "
        named += "teacher) from tokens drawn from the student's whole distribution, but "
        if self.generate_from_teacher:
            raise UserError(
                f"{named}{self.other_writer}. Set the estimator to full_vocabulary or topk."
            )
        for option, whole in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            given = getattr(self.sampling, option)
            if given != whole:
                raise UserError(
                    f"{named}model.sampling.{option} is {given}, which leaves tokens out and "
                    f"biases it. Set {option} to {whole}, or the estimator to full_vocabulary or "
                    "topk."
                )

    def check_before_fit(self, rows: Sequence[Demonstration]) -> None:
        """Refuse what the engine cannot sample.

        Raises:
            UserError: Names the option.
        """
        super().check_before_fit(rows)
        self.rollouts.check_engine(quantized=self.policy.quantization is not None)

    def check_can_shard(self, trains: bool) -> None:
        """Refuse what cannot be spread over processes, an engine that wants whole weights among it.

        Args:
            trains: Whether the model is trained.

        Raises:
            UserError: Names the option.
        """
        super().check_can_shard(trains)
        if trains:
            self.rollouts.check_takes_shards()

    def teardown(self, stage: str) -> None:
        """Give back what the engine holds, and what an interrupted window has left."""
        self.rollouts.close()

    @property
    def step_names(self) -> list[str]:
        """With what `log_step` and the correction of the sampler log."""
        logged = ["loss", "kl", "student_entropy", "teacher_entropy", "top1_agreement"]
        logged += ["completion_length", "truncated_fraction", "distinct_2"]
        phases = ["rollout", "student", "teacher", "divergence"]
        names = [f"train/{name}" for name in logged] + self.rollouts.step_names
        return [*super().step_names, *names, *(f"perf/{phase}_seconds" for phase in phases)]

    @property
    def token_loss(self) -> Divergence:
        """What is summed over tokens."""
        return self.divergence

    @property
    def new_tokens(self) -> int:
        """Longest completion that is sampled in training."""
        return self.sampling.max_new_tokens
