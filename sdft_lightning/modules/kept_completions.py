"""Completions that are made once for each row and then kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sdft_lightning.types import Rollout


class KeptCompletion(NamedTuple):
    """One completion of a row.

    Attributes:
        token_ids: Up to and including the stop token.
        truncated: Whether it ends without one.
    """

    token_ids: list[int]
    truncated: bool


class KeptCompletions:
    """Completions by the id of their row, with a state for checkpoints."""

    def __init__(self) -> None:
        self._rows: dict[str, list[KeptCompletion]] = {}

    def __contains__(self, row_id: str) -> bool:
        """Whether a row has its completions."""
        return row_id in self._rows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def put(self, row_id: str, completions: list[KeptCompletion]) -> None:
        """Keep all completions of a row, in place of those that it had."""
        self._rows[row_id] = completions

    def put_rollout(self, row_ids: Sequence[str], rollout: Rollout) -> None:
        """Keep a rollout of so many rows, each with the same number of completions."""
        samples = len(rollout.truncated) // len(row_ids)
        found = [
            KeptCompletion(ids[mask].tolist(), bool(truncated))
            for ids, mask, truncated in zip(
                rollout.completion_ids, rollout.completion_mask, rollout.truncated, strict=True
            )
        ]
        for place, row_id in enumerate(row_ids):
            self.put(row_id, found[place * samples : (place + 1) * samples])

    def rollout(self, row_ids: Sequence[str], pad_id: int, device: torch.device) -> Rollout:
        """The completions of rows as if they had just been sampled.

        Args:
            row_ids: B ids, all of them kept.
            pad_id: Padding id.
            device: Where the tensors go.

        Returns:
            The rollout; its sampled log-probabilities are not known and NaN.
        """
        kept = [completion for row_id in row_ids for completion in self._rows[row_id]]
        longest = max(len(completion.token_ids) for completion in kept)
        padded = [
            completion.token_ids + [pad_id] * (longest - len(completion.token_ids))
            for completion in kept
        ]
        ids = torch.tensor(padded)  # (R, T)
        lengths = torch.tensor([len(completion.token_ids) for completion in kept])  # (R,)
        mask = torch.arange(longest) < lengths.unsqueeze(1)  # (R, T)
        unknown = torch.full(ids.shape, torch.nan)  # (R, T)
        truncated = torch.tensor([completion.truncated for completion in kept])  # (R,)
        return Rollout(*(part.to(device) for part in (ids, mask, unknown, truncated)))

    def state(self) -> dict[str, Any]:
        """Tensors and plain values; in the order of the ids, whatever the order of making."""
        ids = sorted(self._rows)
        kept = [completion for row_id in ids for completion in self._rows[row_id]]
        tokens = [torch.tensor(completion.token_ids, dtype=torch.int32) for completion in kept]
        return {
            "row_ids": ids,
            "samples": [len(self._rows[row_id]) for row_id in ids],
            "lengths": torch.tensor([len(part) for part in tokens], dtype=torch.int32),
            "tokens": torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int32),
            "truncated": torch.tensor([completion.truncated for completion in kept]),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Keep what `state` had, and nothing else."""
        parts = state["tokens"].split(state["lengths"].tolist()) if state["row_ids"] else []
        kept = [
            KeptCompletion(part.tolist(), bool(truncated))
            for part, truncated in zip(parts, state["truncated"], strict=True)
        ]
        self._rows = {}
        start = 0
        for row_id, samples in zip(state["row_ids"], state["samples"], strict=True):
            self._rows[row_id] = kept[start : start + samples]
            start += samples

    def share(self) -> None:
        """Take over what the other ranks have; all of them must call it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, self._rows)
        # In the order of the ranks, so that all end with the same where two made the same row.
        for rows in reversed(gathered):
            self._rows = {**self._rows, **rows}
