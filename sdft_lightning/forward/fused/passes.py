"""What the two halves of all layers of a pass have in common, and what each leaves behind."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.fused.attention import Buffers, Shape
from sdft_lightning.forward.fused.groups import Group
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
        kept: The dtype of what is kept of products.
        dtype: In which they are made.
    """

    angles: Angles
    groups: list[Group]
    shape: Shape
    buffers: Buffers
    kept: torch.dtype
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
    decoder: Decoder, groups: list[Group], positions: Tensor, hidden: Tensor, kept: torch.dtype
) -> Pass:
    """What the layers need besides the states.

    Args:
        decoder: Of the model.
        groups: How the tokens belong together.
        positions: `(N,)`.
        hidden: `(N, D)` embedded tokens.
        kept: The dtype of what is kept of products, in which they are made where that is fast.
    """
    shape = Shape(decoder.heads, decoder.key_heads, decoder.head_size)
    angles = _angles(decoder.rotary, hidden, positions)
    return Pass(angles, groups, shape, Buffers(), kept, product_dtype(kept))


@torch.no_grad()
def _angles(rotary: Any, hidden: Tensor, positions: Tensor) -> Angles:
    """Both halves of a head are rotated alike, so half of what transformers returns is enough."""
    cosines, sines = (
        each[0].unsqueeze(1).chunk(2, dim=-1)[0].float()  # (N, 1, E / 2)
        for each in rotary(hidden, positions.unsqueeze(0))
    )
    return Angles(cosines, sines)
