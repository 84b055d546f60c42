"""Supervised fine-tuning on the same demonstrations: the baseline."""

from __future__ import annotations

from torch import Tensor

from sdft_lightning.modules.supervised import SupervisedModule
from sdft_lightning.types import PromptBatch


class SFTModule(SupervisedModule):
    """Cross-entropy on the demonstrations, averaged as SDFT averages its divergence."""

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Predict the demonstration, its stop token included, after the bare question."""
        target, keep = batch.demonstration_ids, batch.demonstration_mask  # (B, T)
        student = self.student_hidden(batch.prompts, batch.demonstrations)  # (N, D)
        loss, tokens = self.token_cross_entropy(student, target, keep)
        self.log_step(loss, tokens, keep)
        return loss
