"""Re-invoke: after SFT, on-policy distillation from the original model on general prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from sdft_lightning.forward.policy import WeightsDtype, load_policy
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.models.lora import LoRA
from sdft_lightning.models.precision import Quantization
from sdft_lightning.modules.base import OptimizerFactory
from sdft_lightning.modules.identity import check_same_kind
from sdft_lightning.modules.on_policy import DEFAULT_ENGINE
from sdft_lightning.modules.schedule import Schedule
from sdft_lightning.modules.sdft import SDFTModule
from sdft_lightning.rollout import Engine, Sampling
from sdft_lightning.rollout.mismatch import MismatchCorrection, SamplerAlarm
from sdft_lightning.rollout.student import SamplingDtype
from sdft_lightning.teacher import FrozenTeacher
from sdft_lightning.types import Demonstration, PromptBatch, RowNeeds, Tokens


class ReinvokeModule(SDFTModule):
    """The trained student answers general prompts and is pulled toward its former self.

    The step is SDFT's; the teacher is the original model, frozen and in float32, and sees the bare
    prompt as the student does. Rows need no demonstration.

    Args:
        original_model_name: The model before SFT: `embedded`, a folder written by save_pretrained,
            or a Hub id.
        original_revision: Its branch, tag or commit on the Hub.
        model_name: The trained student: a folder that `export` wrote, or a Hub id.
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
        divergence: What is minimised at each token; the original model is the teacher.
        eval_max_new_tokens: Longest completion in validation, test and predict; these are greedy.
        seed: Seed of the sampled completions; set from seed_everything.
        engine: Who samples in training: TransformersEngine (default), VLLMEngine or
            VLLMServerEngine (docs/vllm.md); evaluation is always done by transformers.
        mismatch_correction: Weighs the loss by trainer's over engine's probability.
        sampler_alarm: When these are too far apart.
    """

    row_needs: ClassVar[RowNeeds] = RowNeeds(demonstration=False, teacher_prompt=False)
    has_preflight: ClassVar[bool] = False

    def __init__(
        self,
        original_model_name: str,
        original_revision: str | None = None,
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
        divergence: Divergence = Divergence(),  # noqa: B008 - frozen
        eval_max_new_tokens: int = 1024,
        seed: int = 42,
        engine: Engine = DEFAULT_ENGINE,
        mismatch_correction: MismatchCorrection = MismatchCorrection(),  # noqa: B008 - frozen
        sampler_alarm: SamplerAlarm = SamplerAlarm(),  # noqa: B008 - frozen
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
            sampling=sampling,
            sampling_dtype=sampling_dtype,
            teacher=FrozenTeacher(),
            divergence=divergence,
            eval_max_new_tokens=eval_max_new_tokens,
            seed=seed,
            engine=engine,
            mismatch_correction=mismatch_correction,
            sampler_alarm=sampler_alarm,
        )
        self.original_model_name = original_model_name
        self.original_revision = original_revision

    def check_before_fit(self, rows: Sequence[Demonstration]) -> None:
        """Refuse what the engine cannot sample, and an original that the student cannot come from.

        Raises:
            UserError: If there is no such model, or it has another architecture or tokenizer.
        """
        super().check_before_fit(rows)
        self.check_original()

    def check_original(self) -> None:
        """Refuse an original model that the student cannot come from."""
        check_same_kind(
            self.model_name, self.revision, self.original_model_name, self.original_revision
        )

    def load_teacher(self) -> None:
        """Take the original model as the teacher."""
        self.check_original()
        original = load_policy(
            self.original_model_name,
            self.original_revision,
            attn_implementation=self.attn_implementation,
            check=False,  # it is of the student's kind, which is checked
        )
        self.teacher.hold(original.model)

    def teacher_prompts(self, batch: PromptBatch) -> Tokens:
        """The bare prompts `(B, P)`: there is no demonstration."""
        return batch.prompts
