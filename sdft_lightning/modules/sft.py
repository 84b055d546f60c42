"""Supervised fine-tuning on the same demonstrations: the baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sdft_lightning.bounded import bounded_cross_entropy
from sdft_lightning.hidden import completion_hidden_states
from sdft_lightning.masking import sequence_weights
from sdft_lightning.modules.base import PolicyModule
from sdft_lightning.types import PromptBatch, TokenStatistics


class SFTModule(PolicyModule):
    """Cross-entropy on the demonstrations, averaged as SDFT averages its divergence."""

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Predict the demonstration, its stop token included, after the bare question."""
        keep = batch.demonstration_mask  # (B, T)
        student = self.student_hidden(batch)  # (N, D)
        loss, tokens = self.token_cross_entropy(student, batch)
        self._log_step(loss, tokens, keep)
        return loss

    def student_hidden(self, batch: PromptBatch) -> Tensor:
        """The student's hidden states `(N, D)` at the tokens of the demonstrations."""
        with self.timed("student"):
            return completion_hidden_states(
                self.student,
                batch.prompt_ids,
                batch.prompt_mask,
                batch.demonstration_ids,
                batch.demonstration_mask,
                batch.demonstration_mask,
            )

    def token_cross_entropy(
        self, student: Tensor, batch: PromptBatch
    ) -> tuple[Tensor, TokenStatistics]:
        """Mean over the tokens of each demonstration, then over demonstrations."""
        keep = batch.demonstration_mask  # (B, T)
        with self.timed("divergence"):
            return bounded_cross_entropy(
                student,
                self.student_head,
                batch.demonstration_ids[keep],  # (N,)
                sequence_weights(keep)[keep],  # (N,)
            )

    def _log_step(self, loss: Tensor, tokens: TokenStatistics, mask: Tensor) -> None:
        values: dict[str, Any] = {
            "student_entropy": tokens.student_entropy.mean(),
            "completion_length": mask.sum(dim=1).float().mean(),
        }
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        for name, value in values.items():
            self.log(f"train/{name}", value, sync_dist=True)
        self.completion_tokens = int(mask.sum())
