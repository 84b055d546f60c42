"""Rows to retain: the student's own answers to bare prompts are held to those before training."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.losses.masking import sequence_weights
from sdft_lightning.modules.rollouts import Rollouts, SampledWindow
from sdft_lightning.rollout import RolloutRequest, Sampling, TransformersEngine
from sdft_lightning.teacher import FrozenTeacher, Teacher
from sdft_lightning.types import PromptBatch, Rollout, TaskData

if TYPE_CHECKING:
    from sdft_lightning.modules.base import PolicyModule

log = logging.getLogger(__name__)


class RetainedRows:
    """Adds the rows to retain (`data.retain`) to the loss of any method.

    The student samples its own answers to them; the teacher is the model as it was before training,
    shown the same bare prompt. A run's checks call `plan`, the module `load` when it has loaded its
    models, and a training step `beside` with the loss of its other rows.

    Args:
        module: Whose student answers.
        copy: Whether a frozen copy of the whole model may be made for it.

    Attributes:
        new_tokens: Longest answer; 0 where a run has no rows to retain.
        tokens: Tokens of the answers of the last micro-batch.
    """

    def __init__(self, module: PolicyModule, copy: bool) -> None:
        self.new_tokens = 0
        self.tokens = 0
        self._module = module
        self._copy = copy
        self._window = SampledWindow()

    def plan(self, data: TaskData | None, trainer: Any, command: str) -> None:
        """Find out whether a run has rows to retain, and whom the student is compared with.

        Args:
            data: The data module, set up; None for one that is not asked.
            trainer: Who carries out the command.
            command: fit, validate, test or predict.

        Raises:
            UserError: If a copy of the model is needed that was not asked for, or asked for and not
                needed; if processes that compute together would not all have such rows.
        """
        fits = command == "fit" and data is not None
        self.new_tokens = data.retained_new_tokens if fits and data is not None else 0
        module = self._module
        has_one = not self.needs_copy
        if self._copy and fits and (has_one or not self.new_tokens):
            why = "there are no rows to retain (data.retain)"
            if has_one:
                why = "the teacher of the rows to retain is there without it"
            raise UserError(f"model.initial_copy: got true, and {why}. Leave it out.")
        if not self.new_tokens:
            return
        if not (has_one or self._copy):
            raise UserError(
                "data.retain: the rows to retain are compared with the model as it was before "
                f"training, which {type(module).__name__} does not keep with these options. Ask "
                "for a frozen copy with --model.initial_copy=true (4 bytes a parameter more), or "
                "use --model.teacher=FrozenTeacher or adapters (--model.policy.lora.r=16), which "
                "need none."
            )
        uneven = data is not None and not data.retains_evenly and trainer.world_size > 1
        if uneven and isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "data.retain_share: under fsdp2 all processes act at the same time, and in some "
                "batches not all of them would have a row to retain. Set data.batch_size and "
                "data.retain_share so that their product is a whole number."
            )

    @property
    def needs_copy(self) -> bool:
        """Whether nothing else of the run keeps the model as it was before training."""
        module = self._module
        return module.teacher_before_training is None and module.policy.lora is None

    @property
    def step_names(self) -> list[str]:
        """Names of what `beside` logs."""
        if not self.new_tokens:
            return []
        return ["train/retained_kl", "train/retained_truncated", "perf/retained_seconds"]

    @property
    def holds_initial(self) -> bool:
        """Whether a run keeps the model as it was beside the teachers of its method."""
        return bool(self.new_tokens) and self._module.teacher_before_training is None

    def load(self) -> None:
        """Keep the model as it is, before training, where no teacher of the module does."""
        module = self._module
        if not self.holds_initial or module.initial is not None:
            return
        module.initial = FrozenTeacher()
        module.initial.copy_from(module.student)
        if self._copy:
            count = sum(each.numel() for each in module.initial.parameters())
            log.info(
                f"model.initial_copy: a frozen copy of {count:,} parameters, {4 * count / 1e9:.2f} "
                "GB, for the rows to retain"
            )

    def beside(self, loss: Tensor, batch: PromptBatch) -> Tensor:
        """The loss of a micro-batch with that of its rows to retain; each row counts alike.

        Args:
            loss: Scalar, the mean over the other rows.
            batch: The micro-batch.
        """
        self.tokens = 0
        if not self.new_tokens:
            return loss
        module, retained = self._module, batch.retained
        if retained is None:  # other ranks may have some, and log alike
            self._note(loss.new_zeros(0), loss.new_zeros(0), loss.new_zeros(0))
            return loss
        with module.timing.timed("retained"):
            mean = self._mean(retained, batch)
        rows, more = len(batch.rows), len(retained.rows)
        return (loss * rows + mean * more) / (rows + more)

    def weights_of_log(self, keep: Tensor) -> Tensor:
        """Weights `(N,)` of tokens in what is logged: of each row alike, over micro-batches, too.

        Args:
            keep: `(R, T)` the N tokens in the loss.
        """
        weights = sequence_weights(keep)[keep]
        # Beside rows to retain, micro-batches have different numbers of others.
        return weights * keep.shape[0] if self.new_tokens else weights

    def _mean(self, retained: PromptBatch, batch: PromptBatch) -> Tensor:
        """The divergence from the model as it was: mean over tokens, then over answers."""
        module = self._module
        rollout = self._window.take(
            retained._replace(window=_retained(batch.window)),
            module.trainer.global_step,
            self._sample,
        )
        keep = rollout.completion_mask  # (R, T)
        student = module.passes.hidden(retained.prompts, rollout.completions, keep)  # (N, D)
        before = self._before(retained, rollout)  # (N, D)
        weights = sequence_weights(keep)[keep]  # (N,)
        correction = None
        if self._rollouts is not None:
            correction = self._rollouts.correction(student, rollout, keep)  # (N,)
        loss, tokens = bounded_divergence(
            before,
            self._teacher.gather_head(),
            student,
            module.gather_head(),
            rollout.completion_ids[keep],
            weights if correction is None else weights * correction,
            getattr(module, "divergence", Divergence()),
            self._sampling.temperature,
        )
        self.tokens = int(keep.sum())
        self._note(tokens.kl, self.weights_of_log(keep), rollout.truncated)
        return loss

    def _before(self, retained: PromptBatch, rollout: Rollout) -> Tensor:
        states: Tensor = self._teacher(
            retained.prompts, rollout.completions, rollout.completion_mask
        )
        return states

    def _note(self, kl: Tensor, weights: Tensor, truncated: Tensor) -> None:
        values = self._module.step_values
        values.update("retained_kl", kl, weights)
        values.update("retained_truncated", truncated)

    def requests(self, batches: list[PromptBatch], step: int) -> list[RolloutRequest]:
        """What is to be sampled for the rows to retain of several micro-batches; maybe nothing.

        Args:
            batches: Of one accumulation window.
            step: Optimizer step, to which the random numbers belong.
        """
        return self._requests(_retained(batches), step) if self.new_tokens else []

    def put(self, batches: list[PromptBatch], step: int, rollouts: list[Rollout]) -> None:
        """Take what was sampled for `requests`."""
        if rollouts:
            self._window.put(_retained(batches), step, rollouts)

    def _requests(self, batches: list[PromptBatch], step: int) -> list[RolloutRequest]:
        module = self._module
        return [
            RolloutRequest(
                batch.prompts,
                [row.id for row in batch.rows],
                self._sampling,
                module.seed,
                step,
                module.stop_ids,
                module.tokenizer.pad_token_id,
            )
            for batch in batches
        ]

    def _sample(self, batches: list[PromptBatch], step: int) -> list[Rollout]:
        """The student's answers to rows that nobody has sampled beside others."""
        engine = TransformersEngine() if self._rollouts is None else self._rollouts.engine
        with torch.no_grad():  # what is stored of the other rows' answers stays
            return engine.sample(self._module.passes, self._requests(batches, step))

    @property
    def _rollouts(self) -> Rollouts | None:
        """The samples of the other rows, in methods whose text is sampled."""
        return getattr(self._module, "rollouts", None)

    @property
    def _sampling(self) -> Sampling:
        sampling: Sampling = getattr(self._module, "sampling", Sampling())
        return replace(sampling, max_new_tokens=self.new_tokens)

    @property
    def _teacher(self) -> Teacher:
        return self._module.teacher_before_training or self._module.initial


def _retained(batches: list[PromptBatch]) -> list[PromptBatch]:
    """The rows to retain of several micro-batches, of which some have none."""
    return [each.retained for each in batches if each.retained is not None]
