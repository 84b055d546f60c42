"""Where the text of on-policy methods comes from: completions, an accumulation window at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdft_lightning.losses.masking import sequence_weights
from sdft_lightning.rollout import (
    Engine,
    RolloutRequest,
    Sampling,
    StudentPasses,
    trained_log_probs,
)
from sdft_lightning.rollout.engine import whole_weights_wanted
from sdft_lightning.rollout.mismatch import Mismatch
from sdft_lightning.types import PromptBatch, Rollout, Tokens

if TYPE_CHECKING:
    from sdft_lightning.modules.sdft import SDFTModule

# (batches of a window, optimizer step) -> a rollout for each
SampleWindow = Callable[[list[PromptBatch], int], list[Rollout]]


class Rollouts:
    """Samples completions for training, and tells how far their sampler is from the student.

    A training step calls `take`, which samples a whole window where its first micro-batch asks;
    `of_student` and `of_teacher` say who writes. `correction` gives the weights of tokens that
    another engine has sampled. The module calls `forget` where weights have changed from outside,
    and `close` at the end.

    Args:
        module: Whose student samples.
        sampling: How completions are sampled.
        engine: Who samples for the student.
        mismatch: What is done where that is not quite the student.
    """

    def __init__(
        self, module: SDFTModule, sampling: Sampling, engine: Engine, mismatch: Mismatch
    ) -> None:
        self.sampling = sampling
        self.engine = engine
        self.mismatch = mismatch
        self._module = module
        self._window = SampledWindow()

    def take(self, batch: PromptBatch, sample: SampleWindow) -> Rollout:
        """Completions of a micro-batch, sampled together with its whole accumulation window.

        Args:
            batch: The micro-batch.
            sample: Samples several micro-batches at once.
        """
        return self._window.take(batch, self._module.trainer.global_step, sample)

    def of_student(self, batches: list[PromptBatch], step: int) -> list[Rollout]:
        """The student's answers to the bare questions of several micro-batches, from the engine.

        Those to their rows to retain are sampled in the same call, and given to these rows.

        Args:
            batches: Sampled at once.
            step: Optimizer step, to which the random numbers belong.
        """
        requests = self._requests(batches, [batch.prompts for batch in batches], step)
        retained = self._module.retained_rows
        more = retained.requests(batches, step)
        found = self.engine.sample(self._module.passes, [*requests, *more])
        retained.put(batches, step, found[len(requests) :])
        return found[: len(requests)]

    def of_teacher(
        self, teacher: Any, prompts: list[Tokens], batches: list[PromptBatch], step: int
    ) -> list[Rollout]:
        """The teacher's answers to what it is shown.

        Args:
            teacher: A model that this process can call alone.
            prompts: What the teacher is shown `(B, Q)`, for each of the micro-batches.
            batches: Sampled at once.
            step: Optimizer step, to which the random numbers belong.
        """
        requests = self._requests(batches, prompts, step)
        with torch.no_grad():  # no pass with gradients follows that could use what it computes
            return StudentPasses("same").at(teacher, 0).sample(requests)

    def _requests(
        self, batches: list[PromptBatch], prompts: list[Tokens], step: int
    ) -> list[RolloutRequest]:
        module = self._module
        return [
            RolloutRequest(
                shown,
                [row.id for row in batch.rows],
                self.sampling,
                module.seed,
                step,
                module.stop_ids,
                module.tokenizer.pad_token_id,
            )
            for batch, shown in zip(batches, prompts, strict=True)
        ]

    def forget(self) -> None:
        """Drop what the engine has copied from the weights."""
        self.engine.forget()

    def close(self) -> None:
        """Give back what the engine holds, and what an interrupted window has left."""
        self.engine.close()
        self._module.passes.forget()

    # --- a sampler that is not the student itself ------------------------------------------------

    def check_engine(self, quantized: bool) -> None:
        """Refuse what the engine cannot sample.

        Args:
            quantized: Whether the student has 4-bit weights.

        Raises:
            UserError: Names the option.
        """
        self.engine.check(self.sampling, quantized)

    def check_takes_shards(self) -> None:
        """Refuse an engine that wants whole weights, where the student is spread over processes.

        Raises:
            UserError: If it is one.
        """
        if not self.engine.takes_shards:
            raise whole_weights_wanted()

    @property
    def compares(self) -> bool:
        """Whether the trainer asks itself how likely the sampled tokens were."""
        return not self.engine.is_trainer or self.mismatch.correction != "none"

    @property
    def step_names(self) -> list[str]:
        """Names of what `correction` adds to what steps log."""
        if not self.compares:
            return []
        names = self.mismatch.statistics(torch.zeros(1))
        return [*(f"train/sampler/{name}" for name in names), "perf/sampler_check_seconds"]

    def correction(self, student: Tensor, rollout: Rollout, keep: Tensor) -> Tensor | None:
        """Weights `(N,)` of tokens that were not sampled by the trained model itself, or None.

        How far the two are apart is added to what the step will log.

        Args:
            student: `(N, D)` hidden states at the kept tokens.
            rollout: What was sampled.
            keep: `(R, T)` the tokens in the loss.
        """
        if not self.compares:
            return None
        module = self._module
        with module.timing.timed("sampler_check"):
            trained = trained_log_probs(
                student,
                module.gather_head(),
                rollout.completion_ids[keep],
                self.sampling,
                self.engine.truncates_log_probs,
            )  # (N,)
        difference = trained - rollout.sampled_log_probs[keep]  # (N,)
        weights = sequence_weights(keep)[keep]  # (N,)
        statistics = self.mismatch.statistics(difference, weights)
        largest = statistics.pop("log_prob_difference_max")
        for name, value in statistics.items():
            module.step_values.update(f"sampler/{name}", value, weights.sum())
        module.step_values.update_largest("sampler/log_prob_difference_max", largest)
        return self.mismatch.weights(difference, keep)


class SampledWindow:
    """Keeps the completions that were sampled for the later micro-batches of a window.

    The weights do not move inside a window, so nothing in it is off-policy. A micro-batch that
    finds none (a run resumed inside a window) is sampled on its own; since random numbers belong to
    rows, it gets the completions that it would have had.
    """

    def __init__(self) -> None:
        self._ready: dict[tuple[int, tuple[str, ...]], Rollout] = {}

    def take(self, batch: PromptBatch, step: int, sample: SampleWindow) -> Rollout:
        """The completions of a micro-batch, sampled now if they are not ready.

        Args:
            batch: The micro-batch; on the first of a window, `batch.window` holds the later ones.
            step: Optimizer step.
            sample: Samples several micro-batches at once.
        """
        key = _key(batch, step)
        if key not in self._ready:
            batches = [batch, *batch.window]
            self.put(batches, step, sample(batches, step))
        return self._ready.pop(key)

    def put(self, batches: list[PromptBatch], step: int, rollouts: list[Rollout]) -> None:
        """Keep what was sampled for the micro-batches of a window, and nothing of former ones."""
        self._ready = {
            _key(each, step): rollout for each, rollout in zip(batches, rollouts, strict=True)
        }


def _key(batch: PromptBatch, step: int) -> tuple[int, tuple[str, ...]]:
    """What a micro-batch of an optimizer step is known by."""
    return step, tuple(row.id for row in batch.rows)
