"""Offline distillation: the teacher's own text instead of the student's, written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from sdft_lightning.forward.policy import WeightsDtype
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.models.lora import LoRA
from sdft_lightning.models.precision import Quantization
from sdft_lightning.models.sharding import is_sharded
from sdft_lightning.models.tokenization import load_config, load_stop_ids, load_tokenizer
from sdft_lightning.modules.base import OptimizerFactory
from sdft_lightning.modules.given_completions import (
    CompletionTokens,
    check_completions,
    read_completions,
)
from sdft_lightning.modules.kept_completions import KeptCompletions
from sdft_lightning.modules.schedule import Schedule
from sdft_lightning.modules.sdft import SDFTModule
from sdft_lightning.rollout import Sampling
from sdft_lightning.rollout.student import SamplingDtype
from sdft_lightning.teacher import FrozenTeacher
from sdft_lightning.types import Demonstration, PromptBatch, Rollout, task_data

COMPLETIONS_KEY = "sdft_lightning_completions"
# Completions belong to a row and not to a step: their random numbers are those of this one.
_STEP = 0


class OfflineDistillationModule(SDFTModule):
    """SDFT's loss on text that the frozen teacher wrote once for each row; not on-policy.

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
        sampling: How the teacher's completions are sampled; its temperature is also that of the
            loss.
        completions: A JSON Lines file of completions instead of the teacher's, `{id, completion}`
            with the ids of the training rows; a predictions.jsonl is such a file.
        sampling_dtype: Weights to sample with in evaluation: same, a bfloat16 copy, or auto (the
            copy where the hardware multiplies bfloat16).
        divergence: What is minimised at each token.
        num_loss_tokens_to_skip: Tokens at the start of each answer that the loss leaves out.
        cache_prompts: Keep the keys and values of every teacher prompt in memory, see
            FrozenTeacher.
        teacher_accuracy_in_fit: Grade also the teacher in the validations of a fit; the commands
            validate and test always do.
        eval_max_new_tokens: Longest completion in validation, test and predict; these are greedy.
        seed: Seed of the teacher's completions; set from seed_everything.
    """

    has_preflight: ClassVar[bool] = False
    other_writer: ClassVar[str] = (
        "OfflineDistillationModule trains on what the teacher wrote, or model.completions holds"
    )

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
        completions: str | None = None,
        sampling_dtype: SamplingDtype = "auto",
        divergence: Divergence = Divergence(),  # noqa: B008 - frozen
        num_loss_tokens_to_skip: int = 0,
        cache_prompts: bool = False,
        teacher_accuracy_in_fit: bool = False,
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
            sampling=sampling,
            sampling_dtype=sampling_dtype,
            teacher=FrozenTeacher(cache_prompts),
            divergence=divergence,
            num_loss_tokens_to_skip=num_loss_tokens_to_skip,
            generate_from_teacher=True,
            teacher_accuracy_in_fit=teacher_accuracy_in_fit,
            eval_max_new_tokens=eval_max_new_tokens,
            seed=seed,
        )
        self.completions = completions
        self.kept = KeptCompletions()

    def check_before_fit(self, rows: Sequence[Demonstration]) -> None:
        """Refuse a file of completions that lacks some of the rows.

        Raises:
            UserError: Names the row, or the line that has another form.
        """
        super().check_before_fit(rows)
        if self.completions is None:
            return
        tokenizer = load_tokenizer(self.model_name, self.revision)
        target = CompletionTokens(
            tokenizer,
            load_stop_ids(self.model_name, tokenizer, self.revision),
            load_config(self.model_name, self.revision).vocab_size,
            self.sampling.max_new_tokens,
        )
        given = read_completions(self.completions, target)
        check_completions(given, rows, self.sampling.completions_per_prompt, self.completions)
        for row_id, completions in given.items():
            self.kept.put(row_id, completions)

    def on_fit_start(self) -> None:
        """Take the completions that are given, if any."""
        super().on_fit_start()
        data = task_data(self.trainer)
        self.check_before_fit([] if data is None else data.training_rows())
        # Later one process may have texts to write while another has none.
        if is_sharded(self.student) and self.completions is None:
            self.gather_teacher()

    def sample_rollouts(self, batches: list[PromptBatch], step: int) -> list[Rollout]:
        """The kept completions of several micro-batches; the teacher writes what is not there."""
        missing = [part for part in map(self._missing, batches) if part.rows]
        if missing:
            written = super().sample_rollouts(missing, _STEP)
            for part, rollout in zip(missing, written, strict=True):
                self.kept.put_rollout([row.id for row in part.rows], rollout)
        pad_id = self.tokenizer.pad_token_id
        return [
            self.kept.rollout([row.id for row in batch.rows], pad_id, batch.prompt_ids.device)
            for batch in batches
        ]

    def _missing(self, batch: PromptBatch) -> PromptBatch:
        """The rows of a batch without completions, with what the teacher needs to write them."""
        places = [place for place, row in enumerate(batch.rows) if row.id not in self.kept]
        if places and self.completions is not None:
            row = batch.rows[places[0]]
            check_completions({}, [row], self.sampling.completions_per_prompt, self.completions)
        return batch._replace(
            teacher_prompt_ids=batch.teacher_prompt_ids[places],
            teacher_prompt_mask=batch.teacher_prompt_mask[places],
            rows=[batch.rows[place] for place in places],
        )

    def on_train_epoch_end(self) -> None:
        """From here on rows go to other ranks, which take their completions over."""
        self.kept.share()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the teacher wrote, on all ranks."""
        super().on_save_checkpoint(checkpoint)
        self.kept.share()
        written = self.kept if self.completions is None else KeptCompletions()
        checkpoint[COMPLETIONS_KEY] = written.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the saved completions."""
        super().on_load_checkpoint(checkpoint)
        self.kept.load(checkpoint[COMPLETIONS_KEY])
