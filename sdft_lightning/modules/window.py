"""Completions of a whole accumulation window, sampled at once and handed out one by one.

The weights do not move inside a window, so nothing in it is off-policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad

from sdft_lightning.types import PromptBatch, Rollout, Tokens

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
        key = window_key(batch, step)
        if key not in self._ready:
            batches = [batch, *batch.window]
            rollouts = sample(batches, step)
            self._ready = {
                window_key(each, step): rollout
                for each, rollout in zip(batches, rollouts, strict=True)
            }
        return self._ready.pop(key)


def join_prompts(prompts: Sequence[Tokens]) -> Tokens:
    """Put left-padded prompts below each other.

    Args:
        prompts: `(B_i, P_i)` each.

    Returns:
        `(ΣB_i, max P_i)`, padded further on the left.
    """
    longest = max(ids.shape[1] for ids, _ in prompts)
    ids = [pad(ids, (longest - ids.shape[1], 0)) for ids, _ in prompts]
    masks = [pad(mask, (longest - mask.shape[1], 0)) for _, mask in prompts]
    return Tokens(torch.cat(ids), torch.cat(masks))


def split_rollout(rollout: Rollout, rows: Sequence[int]) -> list[Rollout]:
    """Cut a rollout into parts of so many rows, each as long as its longest completion."""
    parts = []
    for piece in zip(*(tensor.split(list(rows)) for tensor in rollout), strict=True):
        part = Rollout(*piece)
        length = int(part.completion_mask.sum(dim=1).max())
        parts.append(
            Rollout(
                part.completion_ids[:, :length],
                part.completion_mask[:, :length],
                part.sampled_log_probs[:, :length],
                part.truncated,
            )
        )
    return parts


def window_key(batch: PromptBatch, step: int) -> tuple[int, tuple[str, ...]]:
    """What a micro-batch of an optimizer step is known by."""
    return step, tuple(row.id for row in batch.rows)
