"""Methods whose text is given and not sampled: SFT, DFT, continued pre-training, SFT with KL."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.losses.bounded import TokenLoss, bounded_cross_entropy, bounded_divergence
from sdft_lightning.losses.divergence import (
    Divergence,
    PenalisedCrossEntropy,
    cross_entropy,
    probability_weighted,
)
from sdft_lightning.losses.masking import sequence_weights
from sdft_lightning.modules.base import PolicyModule
from sdft_lightning.teacher import FrozenTeacher
from sdft_lightning.types import PromptBatch, RowNeeds, Tokens, TokenStatistics

PenaltyName = Literal["forward_kl", "reverse_kl"]


class SupervisedModule(PolicyModule):
    """What methods on given text share: the student's states at its tokens, the mean, the log."""

    row_needs: ClassVar[RowNeeds] = RowNeeds(target=True, teacher_prompt=False)

    @property
    def token_loss(self) -> TokenLoss:
        """What is summed over tokens."""
        return cross_entropy

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
        with self.timing.timed("student"):
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
        with self.timing.timed("divergence"):
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
        weights = self.retained_rows.weights_of_log(keep)  # (N,)
        self.step_values.update("loss", loss)
        self.step_values.update("cross_entropy", -tokens.student_log_probs, weights)
        self.step_values.update("student_entropy", tokens.student_entropy, weights)
        self.step_values.update("completion_length", keep.sum(dim=1))
        self.completion_tokens = int(keep.sum()) + self.retained_rows.tokens


class SFTModule(SupervisedModule):
    """Supervised fine-tuning on the demonstrations: the baseline.

    - Text: the demonstration, its stop token included, after the bare question.
    - Teacher: none.
    - Compared: the student with each token, by cross-entropy, averaged as SDFT's divergence.
    """

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Predict the demonstration, its stop token included, after the bare question."""
        target, keep = batch.demonstration_ids, batch.demonstration_mask  # (B, T)
        student = self.student_hidden(batch.prompts, batch.demonstrations)  # (N, D)
        loss, tokens = self.token_cross_entropy(student, target, keep)
        loss = self.retained_rows.beside(loss, batch)
        self.log_step(loss, tokens, keep)
        return loss


class DFTModule(SupervisedModule):
    """Dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629): SFT that trusts the model's own odds.

    - Text: the demonstration, after the bare question.
    - Teacher: none; it is not distillation from a fixed teacher, which goes by the same letters.
    - Compared: the student with each token, by cross-entropy times its own detached probability.

    The paper reads SFT as a policy gradient whose reward is divided by the token's probability;
    the weight takes that division back, so that unlikely tokens no longer dominate.
    """

    @property
    def token_loss(self) -> TokenLoss:
        """Cross-entropy times the token's probability."""
        return probability_weighted

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Each token of the demonstration costs −sg[π(y)] · log π(y)."""
        target, keep = batch.demonstration_ids, batch.demonstration_mask  # (B, T)
        student = self.student_hidden(batch.prompts, batch.demonstrations)  # (N, D)
        loss, tokens = self.token_cross_entropy(student, target, keep, probability_weighted)
        loss = self.retained_rows.beside(loss, batch)
        self.log_step(loss, tokens, keep)
        return loss


class CPTModule(SupervisedModule):
    """Continued pre-training on the source texts: knowledge without questions.

    - Text: the context of each row, as plain text without a chat template.
    - Teacher: none.
    - Compared: the student with each next token, by cross-entropy.
    """

    row_needs: ClassVar[RowNeeds] = RowNeeds(
        prompt=False, demonstration=False, context=True, teacher_prompt=False
    )

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Predict each token of the text from those before it."""
        first = Tokens(batch.context_ids[:, :1], batch.context_mask[:, :1])  # (B, 1)
        target, keep = batch.context_ids[:, 1:], batch.context_mask[:, 1:]  # (B, S - 1)
        student = self.student_hidden(first, Tokens(target, keep))  # (N, D)
        loss, tokens = self.token_cross_entropy(student, target, keep)
        loss = self.retained_rows.beside(loss, batch)
        self.log_step(loss, tokens, keep)
        return loss


class SFTKLModule(SupervisedModule):
    """Supervised fine-tuning held near the model that it starts from.

    - Text: the demonstration, after the bare question.
    - Teacher: the model as it was before training, shown the same bare question: unlike SDFT's
      teacher it knows nothing more than the student, and only holds it back.
    - Compared: the student with each token, by cross-entropy, plus λ · KL to the teacher.

    Args:
        kl_weight: λ, above 0; for no penalty choose SFTModule.
        kl_direction: forward_kl is KL(base ‖ student), reverse_kl is KL(student ‖ base), the
            penalty of RLHF.
        kwargs: `PolicyModule`'s.
    """

    def __init__(
        self, *, kl_weight: float = 1.0, kl_direction: PenaltyName = "forward_kl", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not kl_weight > 0:
            raise UserError(
                f"model.kl_weight: got {kl_weight}, allowed is above 0. For SFT without a penalty "
                "choose SFTModule."
            )
        check_choice("model.kl_direction", kl_direction, ["forward_kl", "reverse_kl"])
        self.penalised = PenalisedCrossEntropy(kl_weight, Divergence(kl_direction))
        self.base = FrozenTeacher()

    @property
    def step_names(self) -> list[str]:
        """With the penalty's."""
        return [*super().step_names, "train/kl", "perf/teacher_seconds"]

    @property
    def token_loss(self) -> TokenLoss:
        """Cross-entropy with the penalty."""
        return self.penalised

    def load_teacher(self) -> None:
        """Keep the model that the policy starts from."""
        self.base.copy_from(self.student)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of the demonstration plus λ · KL at each of its tokens."""
        target, keep = batch.demonstration_ids, batch.demonstration_mask  # (B, T)
        student = self.student_hidden(batch.prompts, batch.demonstrations)  # (N, D)
        base = self.base_hidden(batch)  # (N, D), no gradient
        loss, tokens = self.penalised_cross_entropy(student, base, target, keep)
        loss = self.retained_rows.beside(loss, batch)
        self.log_step(loss, tokens, keep)
        self.step_values.update("kl", tokens.kl, self.retained_rows.weights_of_log(keep))
        return loss

    @property
    def teacher_before_training(self) -> FrozenTeacher:
        """The model that the penalty is about."""
        return self.base

    def base_hidden(self, batch: PromptBatch) -> Tensor:
        """The initial model's hidden states `(N, D)` at the tokens of the demonstrations."""
        with self.timing.timed("teacher"):
            hidden: Tensor = self.base(
                batch.prompts, batch.demonstrations, batch.demonstration_mask
            )
            return hidden

    def penalised_cross_entropy(
        self, student: Tensor, base: Tensor, target_ids: Tensor, keep: Tensor
    ) -> tuple[Tensor, TokenStatistics]:
        """Mean over the tokens of each demonstration, then over demonstrations.

        Args:
            student: `(N, D)`.
            base: `(N, D)`.
            target_ids: `(B, T)`.
            keep: `(B, T)`.
        """
        with self.timing.timed("divergence"):
            return bounded_divergence(
                base,
                self.base.gather_head(),
                student,
                self.gather_head(),
                target_ids[keep],  # (N,)
                sequence_weights(keep)[keep],  # (N,)
                self.penalised,
            )
