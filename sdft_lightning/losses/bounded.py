"""The same exact token losses from hidden states and output heads, in bounded memory.

Logits exist for a chunk of tokens at a time. The weight of each token in the loss is known
beforehand, so the gradient is formed in the same pass as the value and no logits are made twice:
peak memory is that of one chunk, whatever N is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdft_lightning.losses.closed_form import BUFFERS, ClosedForm, closed_form
from sdft_lightning.losses.divergence import cross_entropy, floored, log_probs
from sdft_lightning.models.precision import product_dtype
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
    known = gradient_form(token_loss, head.softcap) is not None
    return chunk_tokens(vocabulary, head.weight.device.type, known)


def chunk_tokens(vocabulary: int, device: str, known: bool) -> int:
    """Tokens whose logits exist at once.

    Args:
        vocabulary: V.
        device: Type of the device.
        known: Whether the gradient of the loss is written down.
    """
    tokens = max(1, by_device(CHUNK_ELEMENTS, device) // vocabulary)
    if not known:
        return tokens
    return max(tokens, min(_ENOUGH_TOKENS, by_device(_KNOWN_CHUNK_ELEMENTS, device) // vocabulary))


# (teacher log-probs (C, V), student log-probs (C, V), token ids (C,)) -> loss per token (C,)
TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Where the gradient is written down, a chunk is walked over in pieces of this many logits. On a CPU
# these are 1 MB in float32: they stay in the processor's cache from one operation to the next. On a
# GPU each operation should be worth its launch: 0.5 GB, 880 tokens of 152,000 logits, of which six
# are alive; chunks are shorter.
PIECE_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
# Rows of the head whose gradient is added at once in half precision; on a GPU ten products for
# 152,000 rows instead of 38, each of 117 MB where D = 3584.
_HEAD_ROWS = {"cpu": 2**12, "cuda": 2**14}


class Side(NamedTuple):
    """Hidden states and head of one role, cast once to the dtype of the matrix products."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def logits(self, raw: Tensor) -> Tensor:
        """Scale and cap the products `h Wᵀ + b` `(C, V)`, in float32."""
        logits = raw.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def raw(self, part: slice) -> Tensor:
        """`h Wᵀ + b` `(C, V)` for a part of the tokens."""
        return torch.nn.functional.linear(self.hidden[part], self.weight, self.bias)


def by_device(sizes: dict[str, int], device: str) -> int:
    """The size for a type of device; other accelerators have that of CUDA."""
    return sizes.get(device, sizes["cuda"])


def weighted_loss(
    hidden: Tensor,
    head: OutputHead,
    teacher: Side | None,
    token_ids: Tensor,
    token_weights: Tensor,
    token_loss: TokenLoss,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, TokenStatistics]:
    """Σ_n w_n · token_loss_n, with the logits of `chunk` tokens at a time.

    Args:
        hidden: `(N, D)` of the student.
        head: The student's head.
        teacher: The other role; None compares the student with itself.
        token_ids: `(N,)`.
        token_weights: `(N,)` weight of each token in the loss.
        token_loss: Loss per token, differentiable in the student's log-probabilities.
        temperature: Both logits are divided by it.
        chunk: Tokens whose logits exist at once.

    Returns:
        The scalar loss in float32, and the statistics `(N,)`.
    """
    # Inside `apply` the grad mode is always off; without gradients nothing must be formed.
    if not torch.is_grad_enabled():
        hidden = hidden.detach()
        head = head._replace(
            weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach()
        )
    loss, statistics = _WeightedLoss.apply(  # type: ignore[no-untyped-call]
        hidden,
        head.weight,
        head.bias,
        head,
        teacher,
        token_ids,
        token_weights,
        token_loss,
        temperature,
        chunk,
    )
    return loss, TokenStatistics(*statistics.unbind())


def cast_side(hidden: Tensor, head: OutputHead, vocabulary: int) -> Side:
    """Take the common vocabulary, and the dtype of autocast unless it is slow, for all chunks."""
    device = hidden.device.type
    dtype = head.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    dtype = product_dtype(dtype, device)
    bias = None if head.bias is None else head.bias[:vocabulary].detach().to(dtype)
    rounded = head.rounded
    weight = head.weight if rounded is None or rounded.dtype != dtype else rounded
    return Side(
        hidden.detach().to(dtype),
        weight[:vocabulary].detach().to(dtype),
        bias,
        head.scale,
        head.softcap,
    )


def gradient_form(token_loss: TokenLoss, softcap: float | None) -> ClosedForm | None:
    """How the gradient of a loss is written down, or None where autograd finds it."""
    return closed_form(token_loss) if softcap is None else None


class _WeightedLoss(torch.autograd.Function):
    """Value and gradient of a weighted sum of token losses, chunk by chunk, in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        teacher: Side | None,
        token_ids: Tensor,
        token_weights: Tensor,
        token_loss: TokenLoss,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and the statistics `(7, N)`."""
        size = weight.shape[0] if teacher is None else teacher.weight.shape[0]
        student = cast_side(hidden, head, size)
        gradients = _Gradients(hidden, weight, bias, token_weights, ctx.needs_input_grad)
        tokens = hidden.shape[0]
        chunk = -(-tokens // max(1, -(-tokens // chunk)))  # as many chunks, of equal size
        statistics = torch.zeros(7, tokens, dtype=torch.float32, device=hidden.device)  # (7, N)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, tokens, max(1, chunk)):
                part = slice(start, min(start + chunk, tokens))
                statistics[:, part], raw_grad = _chunk(
                    student,
                    teacher,
                    part,
                    token_ids[part],
                    gradients.weights[part] if gradients.needed else None,
                    token_loss,
                    temperature,
                )
                if raw_grad is not None:
                    gradients.add_(part, raw_grad, student)
                    del raw_grad  # or it would be alive beside the next one
        ctx.gradients = gradients
        ctx.mark_non_differentiable(statistics)
        return (statistics[0] * token_weights).sum(), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass formed."""
        hidden, weight, bias = ctx.gradients.scaled_(grad_outputs[0])
        return (hidden, weight, bias, *[None] * 7)


def _chunk(
    student: Side,
    teacher: Side | None,
    part: slice,
    token_ids: Tensor,
    token_weights: Tensor | None,
    token_loss: TokenLoss,
    temperature: float,
) -> tuple[Tensor, Tensor | None]:
    """Statistics `(7, C)` of one chunk, and the gradient of its products `(C, V)` if weighted."""
    known = gradient_form(token_loss, student.softcap)
    if known is not None:
        return _known_chunk(student, teacher, part, token_ids, token_weights, known, temperature)
    raw = student.raw(part)  # (C, V)
    with torch.set_grad_enabled(token_weights is not None):
        raw.requires_grad_(token_weights is not None)
        student_log_probs = log_probs(student.logits(raw), temperature)  # (C, V)
        teacher_log_probs = student_log_probs.detach()
        if teacher is not None:
            logits = teacher.logits(teacher.raw(part)).detach()
            teacher_log_probs = log_probs(logits, temperature).detach()  # (C, V)
        losses = token_loss(teacher_log_probs, student_log_probs, token_ids)  # (C,)
        raw_grad = None
        if token_weights is not None:
            (raw_grad,) = torch.autograd.grad((losses * token_weights).sum(), raw)  # (C, V)
    statistics = _statistics(
        losses.detach(), teacher_log_probs, student_log_probs.detach(), token_ids
    )
    return statistics, raw_grad


@torch.no_grad()
def _known_chunk(
    student: Side,
    teacher: Side | None,
    part: slice,
    token_ids: Tensor,
    token_weights: Tensor | None,
    known: ClosedForm,
    temperature: float,
) -> tuple[Tensor, Tensor | None]:
    """Statistics and gradient of a chunk for a loss whose gradient is written down."""
    raw = student.raw(part)  # (C, V)
    taught = None if teacher is None else teacher.raw(part)  # (C, V)
    factor = student.scale / temperature
    elements = by_device(PIECE_ELEMENTS, raw.device.type)
    rows = max(1, elements // raw.shape[1])
    # The same memory for all: the system's zeroing of new pages took longer than the work.
    buffers = raw.new_empty(3 + BUFFERS, min(rows, raw.shape[0]), raw.shape[1], dtype=torch.float32)
    statistics = raw.new_empty(7, raw.shape[0], dtype=torch.float32)  # (7, C)
    for start in range(0, raw.shape[0], rows):
        few = slice(start, min(start + rows, raw.shape[0]))
        buffer, mine, theirs = buffers[:3, : few.stop - start]  # (c, V) each
        _log_probs_into(mine, student, raw[few], temperature, buffer)
        if teacher is None or taught is None:
            theirs = mine
        else:
            _log_probs_into(theirs, teacher, taught[few], temperature, buffer)
        weights = None if token_weights is None else token_weights[few]
        statistics[:, few], gradient = known(
            theirs, mine, token_ids[few], weights, buffers[3:, : few.stop - start]
        )
        if gradient is not None:  # in the place of the products, which are not needed again
            raw[few] = gradient if factor == 1.0 else gradient.mul_(factor)
    return statistics, None if token_weights is None else raw


def _log_probs_into(
    out: Tensor, side: Side, raw: Tensor, temperature: float, buffer: Tensor
) -> None:
    """Write the log-probabilities of a side's logits into `out`, `(c, V)`; `buffer` is as large."""
    if side.softcap is not None:
        out.copy_(log_probs(side.logits(raw), temperature))
        return
    buffer.copy_(raw)
    if side.scale != 1.0:
        buffer.mul_(side.scale)
    floored(buffer, out=buffer)
    if temperature != 1.0:
        buffer.div_(temperature)
    torch.log_softmax(buffer, dim=-1, out=out)


class _Gradients:
    """Gradients of the loss, in float32, filled chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weights: Tensor,
        needs: tuple[bool, ...],
    ) -> None:
        self.needed = any(needs[:3])
        self.spent = False
        # Weights of 1 at most while the chunks are in float16, where 1e-4 times a small
        # gradient would be 0; the gradients are scaled back in float32.
        peak = token_weights.abs().max() if token_weights.numel() else token_weights.new_ones(())
        self.peak = peak.clamp(min=torch.finfo(torch.float32).tiny)
        self.weights = token_weights / self.peak
        self.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        sources = (hidden, weight, bias)
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(source, dtype=torch.float32) if source is not None and need else None
            for source, need in zip(sources, needs[:3], strict=True)
        )

    def add_(self, part: slice, raw_grad: Tensor, student: Side) -> None:
        """Add the gradient of one chunk, given that of its products `(C, V)`."""
        size = student.weight.shape[0]
        if self.hidden is not None:
            self.hidden[part] = raw_grad @ student.weight  # (C, D)
        if self.weight is not None:
            hidden = student.hidden[part]  # (C, D)
            if raw_grad.dtype == torch.float32:
                self.weight[:size].addmm_(raw_grad.T, hidden)  # (V, D)
            else:
                # Block by block, since the product is in half precision and as large as the head.
                rows = by_device(_HEAD_ROWS, raw_grad.device.type)
                for start in range(0, size, rows):
                    block = slice(start, min(start + rows, size))
                    self.weight[block] += raw_grad[:, block].T @ hidden  # (rows, D)
        if self.bias is not None:
            self.bias[:size] += raw_grad.float().sum(dim=0)  # (V,)

    def scaled_(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients times `factor`, in the dtypes of what they belong to."""
        if self.spent:
            raise RuntimeError(
                "The gradients of this loss were already taken; call the loss again for a second "
                "backward pass."
            )
        self.spent = True
        filled = (self.hidden, self.weight, self.bias)
        hidden, weight, bias = (
            None if grad is None else grad.mul_(factor * self.peak).to(dtype)
            for grad, dtype in zip(filled, self.dtypes, strict=True)
        )
        self.hidden = self.weight = self.bias = None
        return hidden, weight, bias


def _statistics(losses: Tensor, teacher: Tensor, student: Tensor, token_ids: Tensor) -> Tensor:
    index = token_ids.unsqueeze(-1)  # (C, 1)
    teacher_probs = teacher.exp()  # (C, V)
    teacher_entropy = -(teacher_probs * teacher).sum(dim=-1)  # (C,)
    cross_entropy = -(teacher_probs * student).sum(dim=-1)  # (C,)
    return torch.stack(
        [
            losses,
            (cross_entropy - teacher_entropy).clamp(min=0.0),  # rounding may leave -1e-6
            -(student.exp() * student).sum(dim=-1),
            teacher_entropy,
            (teacher.argmax(dim=-1) == student.argmax(dim=-1)).float(),
            student.gather(-1, index).squeeze(-1),
            teacher.gather(-1, index).squeeze(-1),
        ]
    )  # (7, C)
