"""Completions of a whole accumulation window, sampled at once and handed out one by one.

The weights do not move inside a window, so nothing in it is off-policy.
"""

from __future__ import annotations

from collections.abc import Callable

from sdft_lightning.types import PromptBatch, Rollout

# (batches of a window, optimizer step) -> a rollout for each
SampleWindow = Callable[[list[PromptBatch], int], list[Rollout]]


class SampledWindow:
    """Keeps the completions that were sampled for the later micro-batches of a window.

    A micro-batch that finds none (a run resumed inside a window) is sampled on its own; since
    random numbers belong to rows, it gets the completions that it would have had.
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
            rollouts = sample(batches, step)
            self._ready = {
                _key(each, step): rollout for each, rollout in zip(batches, rollouts, strict=True)
            }
        return self._ready.pop(key)


def _key(batch: PromptBatch, step: int) -> tuple[int, tuple[str, ...]]:
    """What a micro-batch of an optimizer step is known by."""
    return step, tuple(row.id for row in batch.rows)
