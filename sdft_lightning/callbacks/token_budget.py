"""Counts the tokens that a fit trains on, and ends it once there are enough."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch


class TokenBudget(L.Callback):
    """Ends a fit with the optimizer step that reaches so many tokens, over all ranks.

    Tokens are those of completions, or of demonstrations where these are the target.

    Args:
        tokens: How many; without it they are counted only.

    Attributes:
        trained: Tokens so far, those of a resumed run's earlier part included.
    """

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens
        self.trained = 0
        self._step = 0

    def state_dict(self) -> dict[str, int]:
        """The tokens so far."""
        return {"trained": self.trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.trained = state_dict["trained"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run resumed at its end has nothing left to do."""
        self._step = trainer.global_step
        self._stop_if_reached(trainer)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; an optimizer step is never left half done."""
        counted = torch.tensor(module.completion_tokens, device=module.device)
        self.trained += int(trainer.strategy.reduce(counted, reduce_op="sum"))
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._stop_if_reached(trainer)

    def _stop_if_reached(self, trainer: L.Trainer) -> None:
        if self.tokens is not None and self.trained >= self.tokens:
            trainer.should_stop = True
