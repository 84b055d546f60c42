"""Supervised fine-tuning held near the model that it starts from."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.forward.policy import WeightsDtype
from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import Divergence, PenalisedCrossEntropy
from sdft_lightning.losses.masking import sequence_weights
from sdft_lightning.models.lora import LoRA
from sdft_lightning.models.precision import Quantization
from sdft_lightning.modules.base import OptimizerFactory
from sdft_lightning.modules.schedule import Schedule
from sdft_lightning.modules.supervised import SupervisedModule
from sdft_lightning.rollout.student import SamplingDtype
from sdft_lightning.teacher import FrozenTeacher
from sdft_lightning.types import PromptBatch, TokenStatistics

PenaltyName = Literal["forward_kl", "reverse_kl"]


class SFTKLModule(SupervisedModule):
    """Cross-entropy on the demonstrations, plus λ · KL to the initial model at the same tokens.

    Both see the bare question and the demonstration so far: unlike SDFT's teacher, the base model
    knows nothing more than the student, and only holds it back.

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
        kl_weight: λ, above 0; for no penalty choose SFTModule.
        kl_direction: forward_kl is KL(base ‖ student), reverse_kl is KL(student ‖ base), the
            penalty of RLHF.
        sampling_dtype: Weights to sample with in evaluation: same, a bfloat16 copy, or auto (the
            copy where the hardware multiplies bfloat16).
        eval_max_new_tokens: Longest completion in validation, test and predict; these are greedy.
        seed: Seed of the sampled completions; set from seed_everything.
    """

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
        kl_weight: float = 1.0,
        kl_direction: PenaltyName = "forward_kl",
        sampling_dtype: SamplingDtype = "auto",
        eval_max_new_tokens: int = 1024,
        seed: int = 42,
    ) -> None:
        super().__init__(
            model_name=model_name,
            revision=revision,
            weights_dtype=weights_dtype,
            attn_implementation=attn_implementation,
            gradient_checkpointing=gradient_checkpointing,
            lora=lora,
            quantization=quantization,
            optimizer=optimizer,
            schedule=schedule,
            sampling_dtype=sampling_dtype,
            eval_max_new_tokens=eval_max_new_tokens,
            seed=seed,
        )
        if not kl_weight > 0:
            raise UserError(
                f"model.kl_weight: got {kl_weight}, allowed is above 0. For SFT without a penalty "
                "choose SFTModule."
            )
        check_choice("model.kl_direction", kl_direction, ["forward_kl", "reverse_kl"])
        self.penalised = PenalisedCrossEntropy(kl_weight, Divergence(kl_direction))
        self.base = FrozenTeacher()

    @property
    def step_names(self) -> list[str]:
        """With the penalty's."""
        return [*super().step_names, "train/kl", "perf/teacher_seconds"]

    def load_teacher(self) -> None:
        """Keep the model that the policy starts from."""
        self.base.copy_from(self.student)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of the demonstration plus λ · KL at each of its tokens."""
        target, keep = batch.demonstration_ids, batch.demonstration_mask  # (B, T)
        student = self.student_hidden(batch.prompts, batch.demonstrations)  # (N, D)
        base = self.base_hidden(batch)  # (N, D), no gradient
        loss, tokens = self.penalised_cross_entropy(student, base, target, keep)
        self.log_step(loss, tokens, keep)
        self.step_values.update("kl", tokens.kl, sequence_weights(keep)[keep])
        return loss

    def base_hidden(self, batch: PromptBatch) -> Tensor:
        """The initial model's hidden states `(N, D)` at the tokens of the demonstrations."""
        with self.timed("teacher"):
            hidden: Tensor = self.base(
                batch.prompts, batch.demonstrations, batch.demonstration_mask
            )
            return hidden

    def penalised_cross_entropy(
        self, student: Tensor, base: Tensor, target_ids: Tensor, keep: Tensor
    ) -> tuple[Tensor, TokenStatistics]:
        """Mean over the tokens of each demonstration, then over demonstrations.

        Args:
            student: `(N, D)`.
            base: `(N, D)`.
            target_ids: `(B, T)`.
            keep: `(B, T)`.
        """
        with self.timed("divergence"):
            return bounded_divergence(
                base,
                self.base.gather_head(),
                student,
                self.gather_head(),
                target_ids[keep],  # (N,)
                sequence_weights(keep)[keep],  # (N,)
                self.penalised,
            )
