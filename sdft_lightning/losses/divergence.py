"""Per-token divergences between teacher and student, and losses of given tokens.

Divergences take logits `(..., V)` of any float dtype, compute in float32 and return `(...)`
float32, in nats. P is the teacher's distribution, Q the student's, both softmax(logits /
temperature). Source: METHOD §1 (arXiv 2601.19897); Jensen–Shannon with a weight as in Lin (1991).

Losses of given tokens take what a `Divergence` takes, so that the bounded-memory loss works with
any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sdft_lightning.errors import UserError, check_choice

DivergenceName = Literal["forward_kl", "reverse_kl", "generalized_jsd"]
EstimatorName = Literal["full_vocabulary", "topk", "sampled_token"]
Support = Literal["student", "teacher"]

# Logits of -inf (padded vocabularies) would give 0 · inf; a finite floor gives 0.
_LOGIT_FLOOR = -1e30


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log of softmax(logits / temperature) in float32.

    Args:
        logits: `(..., V)`.
        temperature: Sampling temperature, > 0.

    Returns:
        `(..., V)` float32.
    """
    finite = floored(logits.float())  # (..., V)
    if temperature != 1.0:  # a product by one would still be written down
        finite = finite / temperature
    return torch.log_softmax(finite, dim=-1)


def floored(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """Logits `(..., V)`, -inf replaced by a number so low that its probability is 0."""
    return torch.clamp(logits, min=_LOGIT_FLOOR, out=out)


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(P ‖ Q) = Σ P (log P − log Q): teacher first, as in all of the paper's results."""
    teacher, student = _both(teacher_logits, student_logits, temperature)  # (..., V)
    return _forward_kl(teacher, student)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(Q ‖ P) = Σ Q (log Q − log P): student first."""
    teacher, student = _both(teacher_logits, student_logits, temperature)  # (..., V)
    return _forward_kl(student, teacher)


def generalized_jsd(
    teacher_logits: Tensor,
    student_logits: Tensor,
    teacher_weight: float,
    temperature: float = 1.0,
) -> Tensor:
    """β KL(P ‖ M) + (1 − β) KL(Q ‖ M) with M = β P + (1 − β) Q and β = `teacher_weight`.

    Raises:
        UserError: Unless 0 < `teacher_weight` < 1.
    """
    _check_teacher_weight(teacher_weight)
    teacher, student = _both(teacher_logits, student_logits, temperature)  # (..., V)
    return _generalized_jsd(teacher, student, teacher_weight)


def _both(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities on the common vocabulary: heads may be padded to different sizes."""
    size = min(teacher_logits.shape[-1], student_logits.shape[-1])
    return (
        log_probs(teacher_logits[..., :size], temperature),
        log_probs(student_logits[..., :size], temperature),
    )


def _forward_kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(dim=-1)


def _generalized_jsd(teacher: Tensor, student: Tensor, teacher_weight: float) -> Tensor:
    log_weight = torch.log(
        torch.tensor(
            [teacher_weight, 1 - teacher_weight], dtype=teacher.dtype, device=teacher.device
        )
    )
    mixture = torch.logaddexp(teacher + log_weight[0], student + log_weight[1])  # (..., V)
    to_teacher = _forward_kl(teacher, mixture)
    to_student = _forward_kl(student, mixture)
    return teacher_weight * to_teacher + (1 - teacher_weight) * to_student


def _check_teacher_weight(teacher_weight: float | None) -> None:
    if teacher_weight is None or not 0 < teacher_weight < 1:
        raise UserError(
            f"teacher_weight: got {teacher_weight}, allowed is 0 < teacher_weight < 1. The ends "
            "are other divergences: choose forward_kl or reverse_kl by name."
        )


@dataclass(frozen=True)
class Divergence:
    """What is minimised at each token; the defaults are the paper's.

    Args:
        name: forward_kl is KL(teacher ‖ student), reverse_kl is KL(student ‖ teacher),
            generalized_jsd the weighted Jensen–Shannon divergence.
        teacher_weight: Weight β of the teacher in generalized_jsd; only there.
        estimator: full_vocabulary is exact. topk compares the distributions on k tokens only;
            sampled_token is the one-sample estimate of reverse_kl from the sampled token, with the
            score-function gradient; the student must have sampled it, from all tokens. Neither is
            the paper's loss.
        k: Number of tokens for topk; only there.
        support: Whose k likeliest tokens topk takes: student or teacher; only there.
        tail_bucket: For topk, whether the rest of the vocabulary counts as one more token. Without
            it both distributions are renormalised on the k tokens, which is biased; only there.
    """

    name: DivergenceName = "forward_kl"
    teacher_weight: float | None = None
    estimator: EstimatorName = "full_vocabulary"
    k: int | None = None
    support: Support | None = None
    tail_bucket: bool | None = None

    def __post_init__(self) -> None:
        """Refuse combinations in which an option would do nothing."""
        check_choice("divergence.name", self.name, get_args(DivergenceName))
        check_choice("divergence.estimator", self.estimator, get_args(EstimatorName))
        if self.name == "generalized_jsd":
            _check_teacher_weight(self.teacher_weight)
        elif self.teacher_weight is not None:
            raise UserError(
                f"divergence.teacher_weight: got {self.teacher_weight} with name {self.name}, "
                "which has no weight. Leave it out, or set name to generalized_jsd."
            )
        self._check_estimator()

    def _check_estimator(self) -> None:
        if self.estimator == "topk":
            if self.k is None or self.k < 1:
                raise UserError(f"divergence.k: got {self.k}, topk needs 1 or more.")
            check_choice("divergence.support", self.support, get_args(Support))
            if self.tail_bucket is None:
                raise UserError("divergence.tail_bucket: topk needs true or false.")
        elif (self.k, self.support, self.tail_bucket) != (None, None, None):
            raise UserError(
                f"divergence.k, support, tail_bucket: they belong to the estimator topk, got "
                f"{self.estimator}. Leave them out, or set estimator to topk."
            )
        if self.estimator == "sampled_token" and self.name != "reverse_kl":
            raise UserError(
                f"divergence.estimator: sampled_token estimates reverse_kl only, got {self.name}. "
                "Set name to reverse_kl, or estimator to full_vocabulary."
            )

    def __call__(self, teacher: Tensor, student: Tensor, token_ids: Tensor) -> Tensor:
        """Per-token divergence from log-probabilities.

        Args:
            teacher: `(..., V)` log-probabilities of the teacher, float32.
            student: `(..., V)` log-probabilities of the student, float32.
            token_ids: `(...)` the sampled tokens.

        Returns:
            `(...)` float32 in nats.
        """
        if self.estimator == "sampled_token":
            return _sampled_token(teacher, student, token_ids)
        if self.estimator == "topk":
            teacher, student = self._reduce(teacher, student)
        if self.name == "forward_kl":
            return _forward_kl(teacher, student)
        if self.name == "reverse_kl":
            return _forward_kl(student, teacher)
        assert self.teacher_weight is not None
        return _generalized_jsd(teacher, student, self.teacher_weight)

    def _reduce(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        assert self.k is not None
        chooser = teacher if self.support == "teacher" else student
        indices = chooser.detach().topk(min(self.k, chooser.shape[-1]), dim=-1).indices  # (..., k)
        return (
            _on_support(teacher, indices, bool(self.tail_bucket)),
            _on_support(student, indices, bool(self.tail_bucket)),
        )


def topk(
    teacher_logits: Tensor, student_logits: Tensor, divergence: Divergence, temperature: float = 1.0
) -> Tensor:
    """A divergence on the k likeliest tokens of one side, see `Divergence.estimator`."""
    check_choice("divergence.estimator", divergence.estimator, ["topk"])
    teacher, student = _both(teacher_logits, student_logits, temperature)  # (..., V)
    unused = torch.zeros(student.shape[:-1], dtype=torch.long, device=student.device)
    return divergence(teacher, student, unused)


def sampled_token(
    teacher_logits: Tensor, student_logits: Tensor, token_ids: Tensor, temperature: float = 1.0
) -> Tensor:
    """One-sample estimate of reverse_kl at tokens `(...)` that the student sampled."""
    teacher, student = _both(teacher_logits, student_logits, temperature)  # (..., V)
    return _sampled_token(teacher, student, token_ids)


def _on_support(values: Tensor, indices: Tensor, tail_bucket: bool) -> Tensor:
    chosen = values.gather(-1, indices)  # (..., k)
    mass = chosen.logsumexp(dim=-1, keepdim=True)  # (..., 1)
    if not tail_bucket:
        return chosen - mass  # (..., k)
    # Summed over the tokens outside, not 1 - e^mass: where a model is sure, the mass rounds to 1
    # and the rest would lose its value and its gradient. The floor stands for no token at all.
    outside = values.scatter(-1, indices, _LOGIT_FLOOR)  # (..., V)
    rest = outside.logsumexp(dim=-1, keepdim=True)  # (..., 1)
    return torch.cat([chosen, rest], dim=-1)  # (..., k + 1)


def _sampled_token(teacher: Tensor, student: Tensor, token_ids: Tensor) -> Tensor:
    index = token_ids.unsqueeze(-1)  # (..., 1)
    student_log_prob = student.gather(-1, index).squeeze(-1)  # (...)
    ratio = (student_log_prob - teacher.gather(-1, index).squeeze(-1)).detach()  # (...)
    # Value: log Q(y) − log P(y). Gradient: that value times ∇ log Q(y), whose mean over y ~ Q is
    # the gradient of KL(Q ‖ P).
    return ratio + ratio * (student_log_prob - student_log_prob.detach())


def cross_entropy(teacher: Tensor, student: Tensor, token_ids: Tensor) -> Tensor:
    """−log Q(y): the loss of SFT.

    Args:
        teacher: `(..., V)`; not used.
        student: `(..., V)` log-probabilities.
        token_ids: `(...)` the targets y.

    Returns:
        `(...)` in nats.
    """
    return -student.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)  # (...)


def probability_weighted(teacher: Tensor, student: Tensor, token_ids: Tensor) -> Tensor:
    """−sg[Q(y)] · log Q(y): the loss of DFT (Wu et al. 2025, arXiv 2508.05629).

    sg stops the gradient, so that with respect to the logits z it is Q(y) · (Q − onehot(y)).

    Args:
        teacher: `(..., V)`; not used.
        student: `(..., V)` log-probabilities.
        token_ids: `(...)` the targets y.

    Returns:
        `(...)`; 0 for targets that are certain, and also for those that are impossible.
    """
    loss = cross_entropy(teacher, student, token_ids)  # (...)
    return (-loss).exp().detach() * loss


@dataclass(frozen=True)
class PenalisedCrossEntropy:
    """−log Q(y) + λ · D(P, Q): cross-entropy with a penalty for leaving the base model P.

    Args:
        kl_weight: λ.
        divergence: D; forward_kl is KL(P ‖ Q), reverse_kl is KL(Q ‖ P).
    """

    kl_weight: float
    divergence: Divergence

    def __call__(self, teacher: Tensor, student: Tensor, token_ids: Tensor) -> Tensor:
        """Per-token loss.

        Args:
            teacher: `(..., V)` log-probabilities of the base model.
            student: `(..., V)` log-probabilities.
            token_ids: `(...)` the targets y.

        Returns:
            `(...)` in nats.
        """
        penalty = self.divergence(teacher, student, token_ids)  # (...)
        return cross_entropy(teacher, student, token_ids) + self.kl_weight * penalty
