"""The same exact token losses from hidden states and output heads, in bounded memory.

Logits exist for a chunk of tokens at a time, forward and backward; see `chunked`.
"""

from __future__ import annotations

from torch import Tensor

from sdft_lightning.losses.chunked import (
    TokenLoss,
    by_device,
    cast_side,
    gradient_form,
    weighted_loss,
)
from sdft_lightning.losses.token_losses import cross_entropy
from sdft_lightning.types import OutputHead, TokenStatistics

# Logits of one chunk and role, in elements: 16 MB in float32, of which about twenty are alive; on a
# GPU 128 MB, 220 tokens of 152,000 logits, since each chunk reads both heads.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
# Where the gradient is written down two are alive, in the dtype of the products, and a chunk may be
# larger: each reads both heads and adds to a gradient of their size, which decides where it has few
# tokens.
_KNOWN_CHUNK_ELEMENTS, _ENOUGH_TOKENS = {"cpu": 2**25, "cuda": 2**26}, 512


def bounded_divergence(
    teacher_hidden: Tensor,
    teacher_head: OutputHead,
    student_hidden: Tensor,
    student_head: OutputHead,
    token_ids: Tensor,
    token_weights: Tensor,
    divergence: TokenLoss,
    temperature: float = 1.0,
    chunk_elements: int | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """Σ_n w_n D_n over N tokens, and what is logged about them, without N · V logits.

    Heads whose vocabularies are padded to different sizes are compared on the common part.

    Args:
        teacher_hidden: `(N, D_teacher)`; no gradient flows to the teacher.
        teacher_head: Head of the teacher.
        student_hidden: `(N, D)`.
        student_head: Head of the student.
        token_ids: `(N,)` the sampled tokens.
        token_weights: `(N,)` weight of each token in the loss, see `masking.sequence_weights`.
        divergence: What is summed: a `Divergence`, or another loss of both roles.
        temperature: Both logits are divided by it.
        chunk_elements: Logits that exist at once, per role; None: 2**22 on a CPU and 2**25 on
            a GPU, more for large vocabularies where the gradient is written down (`closed_form`).

    Returns:
        The scalar loss in float32, differentiable in the student's hidden states and head, and
        the statistics `(N,)`.
    """
    vocabulary = min(teacher_head.weight.shape[0], student_head.weight.shape[0])
    teacher = cast_side(teacher_hidden, teacher_head, vocabulary)
    return weighted_loss(
        student_hidden,
        student_head,
        teacher,
        token_ids,
        token_weights,
        divergence,
        temperature,
        _chunk_tokens(chunk_elements, vocabulary, divergence, student_head),
    )


def bounded_cross_entropy(
    hidden: Tensor,
    head: OutputHead,
    token_ids: Tensor,
    token_weights: Tensor,
    chunk_elements: int | None = None,
    token_loss: TokenLoss = cross_entropy,
) -> tuple[Tensor, TokenStatistics]:
    """Σ_n w_n (−log Q(token_n)) over N tokens, without N · V logits.

    The statistics compare the student with itself where a teacher would stand.

    Args:
        hidden: `(N, D)`.
        head: The student's head.
        token_ids: `(N,)` targets.
        token_weights: `(N,)` weight of each token in the loss.
        chunk_elements: Logits that exist at once; None as in `bounded_divergence`.
        token_loss: Another loss of the student alone, e.g. `probability_weighted`.

    Returns:
        The scalar loss in float32, and the statistics `(N,)`.
    """
    chunk = _chunk_tokens(chunk_elements, head.weight.shape[0], token_loss, head)
    return weighted_loss(hidden, head, None, token_ids, token_weights, token_loss, 1.0, chunk)


def _chunk_tokens(
    elements: int | None, vocabulary: int, token_loss: TokenLoss, head: OutputHead
) -> int:
    if elements is not None:
        return max(1, elements // vocabulary)
    device = head.weight.device.type
    tokens = max(1, by_device(CHUNK_ELEMENTS, device) // vocabulary)
    if gradient_form(token_loss, head.softcap) is None:
        return tokens
    return max(tokens, min(_ENOUGH_TOKENS, by_device(_KNOWN_CHUNK_ELEMENTS, device) // vocabulary))
