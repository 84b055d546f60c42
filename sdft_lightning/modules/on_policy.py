"""On-policy training: completions sampled from the student itself, by whatever engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import lightning as L
import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from torch import Tensor

from sdft_lightning.forward.policy import WeightsDtype
from sdft_lightning.losses.masking import sequence_weights
from sdft_lightning.models.lora import LoRA
from sdft_lightning.models.precision import Quantization
from sdft_lightning.modules.base import OptimizerFactory, PolicyModule
from sdft_lightning.modules.sampler_watch import SamplerWatch
from sdft_lightning.modules.schedule import Schedule
from sdft_lightning.modules.step_values import bigrams
from sdft_lightning.modules.window import SampledWindow
from sdft_lightning.rollout import (
    Engine,
    RolloutRequest,
    Sampling,
    TransformersEngine,
    trained_log_probs,
)
from sdft_lightning.rollout.engine import whole_weights_wanted
from sdft_lightning.rollout.mismatch import MismatchCorrection, SamplerAlarm
from sdft_lightning.rollout.student import SamplingDtype
from sdft_lightning.types import (
    Demonstration,
    PromptBatch,
    Rollout,
    Tokens,
    TokenStatistics,
)

log = logging.getLogger(__name__)

# Shown by --print_config as a class with its arguments; each module makes its own from it.
DEFAULT_ENGINE = lazy_instance(TransformersEngine)


class OnPolicyModule(PolicyModule):
    """Samples what it learns from, and watches whether the sampler is still the trained model.

    The arguments are `PolicyModule`'s, and:

    Args:
        sampling: How completions are sampled; its temperature is also that of the loss.
        engine: Who samples in training.
        mismatch_correction: Weighs the loss by trainer's over engine's probability.
        sampler_alarm: When these are too far apart.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None,
        weights_dtype: WeightsDtype,
        attn_implementation: str | None,
        gradient_checkpointing: bool,
        lora: LoRA | None,
        quantization: Quantization | None,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        sampling: Sampling,
        sampling_dtype: SamplingDtype,
        eval_max_new_tokens: int,
        seed: int,
        engine: Engine,
        mismatch_correction: MismatchCorrection,
        sampler_alarm: SamplerAlarm,
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
            sampling_dtype,
            eval_max_new_tokens,
            seed,
        )
        self.sampling = sampling
        self.engine = TransformersEngine() if engine is DEFAULT_ENGINE else engine
        self.mismatch_correction = mismatch_correction
        self.sampler_alarm = sampler_alarm
        self._window = SampledWindow()
        self._told_empty = False

    def configure_callbacks(self) -> list[L.Callback]:
        """The sampler is watched where it is compared."""
        watch = [SamplerWatch(self.sampler_alarm)] if self.compares_sampler else []
        return [*watch, *super().configure_callbacks()]

    def forget_copies(self) -> None:
        """Drop what was copied from the weights, the engine's copies among it."""
        super().forget_copies()
        self.engine.forget()

    def check_before_fit(self, rows: Sequence[Demonstration]) -> None:
        """Refuse what the engine cannot sample.

        Raises:
            UserError: Names the option.
        """
        super().check_before_fit(rows)
        self.engine.check(self.sampling, self.quantization is not None)

    def check_can_shard(self, trains: bool) -> None:
        """Refuse what cannot be spread over processes, an engine that wants whole weights among it.

        Args:
            trains: Whether the model is trained.

        Raises:
            UserError: Names the option.
        """
        super().check_can_shard(trains)
        if trains and not self.engine.takes_shards:
            raise whole_weights_wanted()

    def teardown(self, stage: str) -> None:
        """Give back what the engine holds, and what an interrupted window has left."""
        self.engine.close()
        self._passes.forget()

    @property
    def step_names(self) -> list[str]:
        """With what `log_step` and `sampler_correction` log."""
        logged = ["loss", "kl", "student_entropy", "teacher_entropy", "top1_agreement"]
        logged += ["completion_length", "truncated_fraction", "distinct_2"]
        phases = ["rollout", "student", "teacher", "divergence"]
        if self.compares_sampler:
            phases.append("sampler_check")
            of_sampler = self.mismatch_correction.statistics(torch.zeros(1))
            logged += [f"sampler/{name}" for name in of_sampler]
        names = [f"train/{name}" for name in logged]
        return [*super().step_names, *names, *(f"perf/{phase}_seconds" for phase in phases)]

    @property
    def new_tokens(self) -> int:
        """Longest completion that is sampled in training."""
        return self.sampling.max_new_tokens

    @property
    def compares_sampler(self) -> bool:
        """Whether the trainer asks itself how likely the sampled tokens were."""
        return not self.engine.is_trainer or self.mismatch_correction.kind != "none"

    def rollout(self, batch: PromptBatch) -> Rollout:
        """Completions of a micro-batch, sampled together with its whole accumulation window."""
        with self.timed("rollout"):
            return self._window.take(batch, self.trainer.global_step, self.sample_rollouts)

    def sample_rollouts(self, batches: list[PromptBatch], step: int) -> list[Rollout]:
        """The completions of several micro-batches, sampled at once, for an optimizer step."""
        return self.sampled(
            [
                RolloutRequest(
                    self.sampling_prompts(batch),
                    [row.id for row in batch.rows],
                    self.sampling,
                    self.seed,
                    step,
                    self.stop_ids,
                    self.tokenizer.pad_token_id,
                )
                for batch in batches
            ]
        )

    def sampling_prompts(self, batch: PromptBatch) -> Tokens:
        """What the completions answer `(B, P)`: the bare question."""
        return batch.prompts

    def sampled(self, requests: list[RolloutRequest]) -> list[Rollout]:
        """The student's completions of several micro-batches, from the engine."""
        return self.engine.sample(self.passes, requests)

    def sampler_correction(self, student: Tensor, rollout: Rollout, keep: Tensor) -> Tensor | None:
        """Weights `(N,)` of tokens that were not sampled by the trained model itself.

        How far the two are apart is added to what the step will log.

        Args:
            student: `(N, D)` hidden states at the kept tokens.
            rollout: What was sampled.
            keep: `(R, T)` the tokens in the loss.
        """
        if not self.compares_sampler:
            return None
        with self.timed("sampler_check"):
            trained = trained_log_probs(
                student,
                self.gather_head(),
                rollout.completion_ids[keep],
                self.sampling,
                self.engine.truncates_log_probs,
            )  # (N,)
        difference = trained - rollout.sampled_log_probs[keep]  # (N,)
        weights = sequence_weights(keep)[keep]  # (N,)
        statistics = self.mismatch_correction.statistics(difference, weights)
        largest = statistics.pop("log_prob_difference_max")
        for name, value in statistics.items():
            self.step_values.update(f"sampler/{name}", value, weights.sum())
        self.step_values.update_largest("sampler/log_prob_difference_max", largest)
        return self.mismatch_correction.weights(difference, keep)

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
        weights = sequence_weights(keep)[keep]  # (N,)
        for name in ("kl", "student_entropy", "teacher_entropy", "top1_agreement"):
            self.step_values.update(name, getattr(tokens, name), weights)
        mask = rollout.completion_mask  # (R, T)
        self.step_values.update("completion_length", mask.sum(dim=1))
        self.step_values.update("truncated_fraction", rollout.truncated)
        self.step_values.update_bigrams("distinct_2", rollout.completion_ids, mask)
        self.completion_tokens = int(mask.sum())


def distinct_bigrams(completion_ids: Tensor, completion_mask: Tensor) -> float:
    """Distinct pairs of neighbouring tokens over all pairs, in a batch of completions.

    Near 0 where a policy repeats itself, 1 where no pair occurs twice.

    Args:
        completion_ids: `(R, T)`.
        completion_mask: `(R, T)`.
    """
    pairs = bigrams(completion_ids, completion_mask)  # (pairs,)
    return pairs.unique().numel() / pairs.numel() if pairs.numel() else 1.0
