"""What the methods that train on given text share: hidden states at its tokens, and the log."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sdft_lightning.losses.bounded import TokenLoss, bounded_cross_entropy
from sdft_lightning.losses.divergence import cross_entropy
from sdft_lightning.losses.masking import sequence_weights
from sdft_lightning.modules.base import PolicyModule
from sdft_lightning.types import RowNeeds, Tokens, TokenStatistics


class SupervisedModule(PolicyModule):
    """Trains on text that is given and not sampled; methods add the step."""

    row_needs: ClassVar[RowNeeds] = RowNeeds(target=True, teacher_prompt=False)

    @property
    def step_names(self) -> list[str]:
        """With what `log_step` logs."""
        logged = ("loss", "cross_entropy", "student_entropy", "completion_length")
        phases = ["perf/student_seconds", "perf/divergence_seconds"]
        return [*super().step_names, *(f"train/{name}" for name in logged), *phases]

    def student_hidden(self, prompts: Tokens, targets: Tokens) -> Tensor:
        """The student's hidden states `(N, D)` that predict all tokens of the targets.

        Args:
            prompts: `(B, P)`, padded on the left.
            targets: `(B, T)`, padded on the right.
        """
        with self.timed("student"):
            return self.passes.hidden(prompts, targets, targets.mask)

    def token_cross_entropy(
        self,
        student: Tensor,
        target_ids: Tensor,
        keep: Tensor,
        token_loss: TokenLoss = cross_entropy,
    ) -> tuple[Tensor, TokenStatistics]:
        """Mean over the tokens of each text, then over texts, as SDFT averages its divergence.

        Args:
            student: `(N, D)`.
            target_ids: `(B, T)`.
            keep: `(B, T)`.
            token_loss: Loss of each token.
        """
        with self.timed("divergence"):
            return bounded_cross_entropy(
                student,
                self.gather_head(),
                target_ids[keep],  # (N,)
                sequence_weights(keep)[keep],  # (N,)
                token_loss=token_loss,
            )

    def log_step(self, loss: Tensor, tokens: TokenStatistics, keep: Tensor) -> None:
        """Add what every method on given text has to what the step will log.

        Args:
            loss: Scalar.
            tokens: Of the N kept tokens.
            keep: `(B, T)` the tokens in the loss.
        """
        weights = sequence_weights(keep)[keep]  # (N,)
        self.step_values.update("loss", loss)
        self.step_values.update("cross_entropy", -tokens.student_log_probs, weights)
        self.step_values.update("student_entropy", tokens.student_entropy, weights)
        self.step_values.update("completion_length", keep.sum(dim=1))
        self.completion_tokens = int(keep.sum())
