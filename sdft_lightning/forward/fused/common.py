"""What both halves of a layer use: the data of a pass, norms, and large tensors piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.fused.attention import Buffers, Shape
from sdft_lightning.forward.fused.rows import Group
from sdft_lightning.forward.fused.structure import Decoder
from sdft_lightning.models.precision import product_dtype


class Angles(NamedTuple):
    """Rotary positions of all tokens, as `(N, 1, E / 2)` each."""

    cosines: Tensor
    sines: Tensor


class Pass(NamedTuple):
    """What all layers of one pass have in common.

    Attributes:
        angles: Rotary positions.
        groups: How the tokens belong together.
        shape: Heads.
        buffers: Memory to work in.
        stored: The dtype in which results of products are stored for the backward pass.
        dtype: In which they are made.
    """

    angles: Angles
    groups: list[Group]
    shape: Shape
    buffers: Buffers
    stored: torch.dtype
    dtype: torch.dtype


class Results(NamedTuple):
    """What half a layer leaves for its backward pass, and for the next half.

    Attributes:
        scale: Of the norm before it `(N, 1)`.
        products: Of the first product `(N, ...)`: queries, keys and values, or gate and up; of
            tokens that were known before in a tensor of their own, so that they need not be copied.
        out: What comes out `(N, D)`.
    """

    scale: Tensor
    products: tuple[Tensor, ...]
    out: Tensor


def pass_over(
    decoder: Decoder, groups: list[Group], positions: Tensor, hidden: Tensor, stored: torch.dtype
) -> Pass:
    """What the layers need besides the states.

    Args:
        decoder: Of the model.
        groups: How the tokens belong together.
        positions: `(N,)`.
        hidden: `(N, D)` embedded tokens.
        stored: The dtype in which results of products are stored, and in which they are made
            where that is fast.
    """
    shape = Shape(decoder.heads, decoder.key_heads, decoder.head_size)
    angles = _angles(decoder.rotary, hidden, positions)
    return Pass(angles, groups, shape, Buffers(), stored, product_dtype(stored))


@torch.no_grad()
def _angles(rotary: Any, hidden: Tensor, positions: Tensor) -> Angles:
    """Both halves of a head are rotated alike, so half of what transformers returns is enough."""
    cosines, sines = (
        each[0].unsqueeze(1).chunk(2, dim=-1)[0].float()  # (N, 1, E / 2)
        for each in rotary(hidden, positions.unsqueeze(0))
    )
    return Angles(cosines, sines)


def rms(inputs: Tensor, eps: float) -> Tensor:
    """1 / √(mean of squares + ε) over the last axis, `(..., 1)` of `(..., D)`."""
    mean: Tensor = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True).square()
    return (mean / inputs.shape[-1] + eps).rsqrt()


def normed(inputs: Tensor, scale: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """X · scale · weight in a dtype.

    Args:
        inputs: x `(..., D)`, float32.
        scale: `(..., 1)`, see `rms`.
        weight: `(D,)`.
        dtype: Of the result.
    """
    return (inputs * scale).mul_(weight).to(dtype)


def normed_backward(
    gradient: Tensor, inputs: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `normed` in x `(..., D)`, and in its weight `(D,)`, in float32.

    Args:
        gradient: `(..., D)` of the result, in any dtype.
        inputs: x, as there.
        scale: As there.
        weight: As there.
    """
    gradient, weight = gradient.to(inputs.dtype), weight.to(inputs.dtype)
    plain = inputs * scale  # (..., D) x̂
    product = plain * gradient  # (..., D)
    of_weight = product.flatten(0, -2).sum(dim=0)  # (D,)
    along = (product @ weight).unsqueeze(-1).div_(inputs.shape[-1])  # (..., 1)
    of_inputs = torch.mul(gradient, weight, out=product)  # weight · gradient, in float32
    return of_inputs.addcmul_(plain, along, value=-1).mul_(scale), of_weight


# Numbers of the rows that are walked over at once: 1 MB in float32.
_NUMBERS = 2**18


def walk(parts: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of tensors `(N_i, C)` that stand for one `(N, C)`, and which rows of it they are.

    Args:
        parts: One behind the other.
    """
    start = 0
    for part in parts:
        if part.shape[0] == 0:
            continue
        for piece in part.split(max(1, _NUMBERS // part.shape[1])):
            yield slice(start, start + piece.shape[0]), piece
            start += piece.shape[0]
