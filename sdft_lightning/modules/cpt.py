"""Continued pre-training on the source texts: knowledge without questions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sdft_lightning.modules.supervised import SupervisedModule
from sdft_lightning.types import PromptBatch, RowNeeds, Tokens


class CPTModule(SupervisedModule):
    """Next-token training on the context of each row, as plain text without a chat template."""

    row_needs: ClassVar[RowNeeds] = RowNeeds(
        prompt=False, demonstration=False, context=True, teacher_prompt=False
    )

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Predict each token of the text from those before it."""
        first = Tokens(batch.context_ids[:, :1], batch.context_mask[:, :1])  # (B, 1)
        target, keep = batch.context_ids[:, 1:], batch.context_mask[:, 1:]  # (B, S - 1)
        student = self.student_hidden(first, Tokens(target, keep))  # (N, D)
        loss, tokens = self.token_cross_entropy(student, target, keep)
        self.log_step(loss, tokens, keep)
        return loss
