"""Dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629): SFT that trusts the model's own odds."""

from __future__ import annotations

from torch import Tensor

from sdft_lightning.losses.divergence import probability_weighted
from sdft_lightning.modules.supervised import SupervisedModule
from sdft_lightning.types import PromptBatch


class DFTModule(SupervisedModule):
    """Cross-entropy on the demonstrations, each token weighted by its own detached probability.

    The paper reads SFT as a policy gradient whose reward is divided by the token's probability;
    the weight takes that division back, so that unlikely tokens no longer dominate. It is not
    distillation from a fixed teacher, which goes by the same letters elsewhere.
    """

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Each token of the demonstration costs −sg[π(y)] · log π(y)."""
        target, keep = batch.demonstration_ids, batch.demonstration_mask  # (B, T)
        student = self.student_hidden(batch.prompts, batch.demonstrations)  # (N, D)
        loss, tokens = self.token_cross_entropy(student, target, keep, probability_weighted)
        self.log_step(loss, tokens, keep)
        return loss
