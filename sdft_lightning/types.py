"""The records that travel between the rooms, and the letters of their dimensions.

B batch (rows), P prompt, Q teacher prompt, T completion, V vocabulary, D hidden, N tokens kept.
Masks are boolean, true = keep.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

Message = dict[str, Any]


class Demonstration(NamedTuple):
    """One row of a data set: a question and the expert's answer to it.

    Attributes:
        id: Unique within its file; completions are sampled from random numbers that belong to it.
        prompt: Chat messages up to and including the last user turn.
        demonstration: The expert's answer as chat messages; empty where only a grade is wanted.
        context: Source text that the teacher may read, if any.
        reference: What the grader compares with, if any.
        origin: `file, row n`, for messages to the user.
    """

    id: str
    prompt: list[Message]
    demonstration: list[Message]
    context: str | None
    reference: Any
    origin: str


class PromptBatch(NamedTuple):
    """Tokenized prompts of both roles for B rows, and the demonstration as a target.

    Attributes:
        prompt_ids: `(B, P)` student prompts, padded on the left.
        prompt_mask: `(B, P)`.
        teacher_prompt_ids: `(B, Q)` teacher prompts, padded on the left; Q = 0 where no row has a
            demonstration.
        teacher_prompt_mask: `(B, Q)`.
        demonstration_ids: `(B, T)` tokens of the demonstration with its stop token, padded on the
            right.
        demonstration_mask: `(B, T)`.
        rows: The B rows themselves.
        task: Name of the data set that the rows belong to.
        grader: Name of the grader for `task`; empty where nothing is graded.
        window: The prompts of the whole accumulation window, on its first micro-batch.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    teacher_prompt_ids: Tensor
    teacher_prompt_mask: Tensor
    demonstration_ids: Tensor
    demonstration_mask: Tensor
    rows: list[Demonstration]
    task: str
    grader: str
    window: list[PromptBatch]


class Rollout(NamedTuple):
    """Completions of R = B · completions_per_prompt rows; row `b · n + j` is sample j of prompt b.

    Attributes:
        completion_ids: `(R, T)`, padded on the right.
        completion_mask: `(R, T)`, true up to and including the first stop token.
        sampled_log_probs: `(R, T)` float32, log-probability of each token under the policy at the
            sampling temperature, before top-k, top-p and min-p; zero outside the mask.
        truncated: `(R,)`, true where no stop token was sampled in time.
    """

    completion_ids: Tensor
    completion_mask: Tensor
    sampled_log_probs: Tensor
    truncated: Tensor


class OutputHead(NamedTuple):
    """What turns hidden states into logits: `cap · tanh((h Wᵀ + b) · scale / cap)`.

    Attributes:
        weight: `(V, D)`; the embedding itself where the model ties them.
        bias: `(V,)` or None.
        scale: Factor on the logits (Cohere, Granite); 1 for most models.
        softcap: Bound of the soft cap (Gemma 2); None for most models.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


class TokenStatistics(NamedTuple):
    """What one pass over the logits tells about each of N tokens; float32, without gradient.

    Attributes:
        divergence: `(N,)` the divergence that is trained on, in nats.
        kl: `(N,)` KL(teacher ‖ student), whatever is trained on.
        student_entropy: `(N,)` in nats.
        teacher_entropy: `(N,)` in nats.
        top1_agreement: `(N,)` 1 where both put the same token first.
        student_log_probs: `(N,)` of the sampled token.
        teacher_log_probs: `(N,)` of the sampled token.
    """

    divergence: Tensor
    kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    student_log_probs: Tensor
    teacher_log_probs: Tensor
