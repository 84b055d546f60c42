"""Self-Distillation Fine-Tuning (METHOD §1, arXiv 2601.19897)."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import WeightsDtype
from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.losses.masking import loss_mask, sequence_weights
from sdft_lightning.models.lora import LoRA
from sdft_lightning.models.precision import Quantization
from sdft_lightning.models.sharding import is_sharded
from sdft_lightning.models.tokenization import token_id
from sdft_lightning.modules.base import OptimizerFactory
from sdft_lightning.modules.on_policy import DEFAULT_ENGINE, OnPolicyModule
from sdft_lightning.modules.schedule import Schedule
from sdft_lightning.modules.teacher_update import TeacherUpdate
from sdft_lightning.rollout import (
    Engine,
    RolloutRequest,
    Sampling,
    StudentPasses,
)
from sdft_lightning.rollout.mismatch import MismatchCorrection, SamplerAlarm
from sdft_lightning.rollout.student import SamplingDtype
from sdft_lightning.teacher import EMATeacher, FrozenTeacher, Teacher
from sdft_lightning.types import PromptBatch, Rollout, TaskData, Tokens, TokenStatistics

# Enough of a prompt's end to hold the assistant header.
_HEADER_TOKENS = 8

# Shown by --print_config as a class with its arguments; each module makes its own from it.
_DEFAULT_TEACHER = lazy_instance(EMATeacher, update_rate=0.01)


class SDFTModule(OnPolicyModule):
    """The student answers the bare question and is pulled toward what its teacher would say.

    Args:
        model_name: `embedded`, a folder written by save_pretrained, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        weights_dtype: Dtype of the trained weights; bfloat16 starves small updates.
        attn_implementation: Passed to transformers, e.g. sdpa or flash_attention_2.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        lora: Train low-rank adapters only (needs the extra `lora`), e.g. --model.lora.r=8.
        quantization: Keep what is frozen below the adapters in 4 bits, nf4 or fp4; on CUDA devices
            (needs the extra `qlora`).
        optimizer: Called with the student's trainable parameters only.
        schedule: How the learning rate moves.
        sampling: How completions are sampled; its temperature is also that of the loss.
        sampling_dtype: Weights to sample with: same, a bfloat16 copy, or auto (the copy where
            the hardware multiplies bfloat16).
        teacher: EMATeacher (default), FrozenTeacher or LiveTeacher.
        divergence: What is minimised at each token.
        num_loss_tokens_to_skip: Tokens at the start of each answer that the loss leaves out.
        generate_from_teacher: Sample the completions from the teacher instead; not on-policy.
        teacher_accuracy_in_fit: Grade also the teacher in the validations of a fit; the commands
            validate and test always do.
        eval_max_new_tokens: Longest completion in validation, test and predict; these are greedy.
        seed: Seed of the sampled completions; set from seed_everything.
        engine: Who samples in training: TransformersEngine (default), VLLMEngine or
            VLLMServerEngine (docs/vllm.md); evaluation is always done by transformers.
        mismatch_correction: Weighs the loss by trainer's over engine's probability.
        sampler_alarm: When these are too far apart.
    """

    has_preflight: ClassVar[bool] = True
    # Why completions may not be the student's own, for messages.
    other_writer: ClassVar[str] = "model.generate_from_teacher is true: the teacher samples"

    def __init__(
        self,
        model_name: str = "embedded",
        revision: str | None = None,
        weights_dtype: WeightsDtype = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
        optimizer: OptimizerFactory = lambda p: torch.optim.AdamW(p, lr=2e-5, weight_decay=0.0),
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        sampling_dtype: SamplingDtype = "auto",
        teacher: Teacher = _DEFAULT_TEACHER,
        divergence: Divergence = Divergence(),  # noqa: B008 - frozen
        num_loss_tokens_to_skip: int = 0,
        generate_from_teacher: bool = False,
        teacher_accuracy_in_fit: bool = False,
        eval_max_new_tokens: int = 1024,
        seed: int = 42,
        engine: Engine = DEFAULT_ENGINE,
        mismatch_correction: MismatchCorrection = MismatchCorrection(),  # noqa: B008 - frozen
        sampler_alarm: SamplerAlarm = SamplerAlarm(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(
            model_name,
            revision,
            weights_dtype,
            attn_implementation,
            gradient_checkpointing,
            lora,
            quantization,
            optimizer,
            schedule,
            sampling,
            sampling_dtype,
            eval_max_new_tokens,
            seed,
            engine,
            mismatch_correction,
            sampler_alarm,
        )
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
        self.teacher = EMATeacher(0.01) if teacher is _DEFAULT_TEACHER else teacher
        self.divergence = divergence
        self.num_loss_tokens_to_skip = num_loss_tokens_to_skip
        self.generate_from_teacher = generate_from_teacher
        self.teacher_accuracy_in_fit = teacher_accuracy_in_fit
        if generate_from_teacher and self.compares_sampler:
            raise UserError(
                "model.generate_from_teacher: the teacher samples with the TransformersEngine and "
                "without model.mismatch_correction only; both are about the student. Leave them "
                "out, or sample from the student."
            )
        if divergence.estimator == "sampled_token":
            self._check_sampled_token()
        self._teacher_passes = StudentPasses("same")

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

    def load_teacher(self) -> None:
        """Make the teacher from the student, before any training."""
        self.teacher.copy_from(self.student)

    def shard_models(self, mesh: Any) -> None:
        """Spread both models over processes; the teacher, too, is asked for whole completions."""
        self._teacher_passes.prepare(self.teacher.network)
        super().shard_models(mesh)

    def forget_copies(self) -> None:
        """Drop what was copied from the weights of student and teacher."""
        super().forget_copies()
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
        return self.teacher_accuracy_in_fit and self._is_shown(taught)

    @property
    def grades_teacher(self) -> bool:
        """Whether the running command grades the teacher beside the student."""
        return self.teacher_accuracy_in_fit or self.trainer.state.fn != "fit"

    def configure_callbacks(self) -> list[L.Callback]:
        """The teacher moves after each optimizer step, before any checkpoint is written."""
        return [TeacherUpdate(), *super().configure_callbacks()]

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One step of METHOD §1: sample, score under both roles, compare, average."""
        rollout = self.rollout(batch)
        keep = self.loss_mask(batch, rollout)  # (R, T)
        student = self.student_hidden(batch, rollout, keep)  # (N, D)
        teacher = self.teacher_hidden(batch, rollout, keep)  # (N, D), no gradient
        correction = self.sampler_correction(student, rollout, keep)  # (N,)
        loss, tokens = self.token_divergence(student, teacher, rollout, keep, correction)
        self.log_step(loss, tokens, rollout, keep)
        return {"loss": loss, "rollout": rollout, "keep": keep, "divergence": tokens.divergence}

    def sampling_prompts(self, batch: PromptBatch) -> Tokens:
        """What is sampled from: the bare question, or what the teacher sees where it samples."""
        if self.generate_from_teacher:
            return self.teacher_prompts(batch)
        return super().sampling_prompts(batch)

    def sampled(self, requests: list[RolloutRequest]) -> list[Rollout]:
        """Completions of the student, or of the teacher where `generate_from_teacher` says so."""
        if not self.generate_from_teacher:
            return super().sampled(requests)
        with torch.no_grad():  # no pass with gradients follows that could use what it computes
            return StudentPasses("same").at(self.gather_teacher(), 0).sample(requests)

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
        with self.timed("student"):
            return self.passes.hidden(batch.prompts, rollout.completions, keep)

    def teacher_hidden(self, batch: PromptBatch, rollout: Rollout, keep: Tensor) -> Tensor:
        """The teacher's hidden states `(N, D)` at the same tokens after its own prompt."""
        with self.timed("teacher"):
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
        with self.timed("divergence"):
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

    def grade(self, batch: PromptBatch) -> dict[str, Any]:
        """Grade the student's answers; in validate and test also the teacher's."""
        outputs = super().grade(batch)
        prompt_ids, prompt_mask = self.teacher_prompts(batch)  # (B, Q)
        taught = prompt_mask.any(dim=1)  # (B,) rows with a demonstration
        if batch.grader and taught.any() and self.grades_teacher:
            rows = [row for row, shown in zip(batch.rows, taught.tolist(), strict=True) if shown]
            outputs["teacher"] = self.graded_completions(
                self.gather_teacher(),
                prompt_ids[taught],
                prompt_mask[taught],
                batch._replace(rows=rows),
                "teacher_accuracy",
            )
        return outputs
