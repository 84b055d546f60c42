"""Root-mean-square norms as transformers has them, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor


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
