"""The two halves of a decoder layer, each as one function with its gradient written down.

Products are made in the dtype of autocast, as there; norms, rotations and residual sums in float32.
Of what lies in between only the results of products are kept for the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

from sdft_lightning.fused.attention import Rooms, Shape, attend, attend_backward, rotate
from sdft_lightning.fused.norm import normed, normed_backward, rms
from sdft_lightning.fused.rows import Group
from sdft_lightning.fused.structure import Layer, joined

_PARTS = "qkv"


class Angles(NamedTuple):
    """Rotary positions of all tokens, as `(N, 1, E / 2)` each."""

    cosines: Tensor
    sines: Tensor


def attention_block(
    hidden: Tensor,
    layer: Layer,
    rounded: Layer,
    angles: Angles,
    groups: list[Group],
    shape: Shape,
    rooms: Rooms,
    dtype: torch.dtype,
) -> Tensor:
    """attention(norm(x)) for all tokens.

    Args:
        hidden: x `(N, D)`, float32.
        layer: Whose attention.
        rounded: Its weights in the dtype of the products, or itself.
        angles: Rotary positions.
        groups: How the tokens belong together.
        shape: Heads.
        rooms: Memory to work in.
        dtype: Of the products.

    Returns:
        `(N, D)` in the dtype of the products.
    """
    parameters = [each.weight for each in (layer.q, layer.k, layer.v, layer.o)]
    biases = [each.bias for each in (layer.q, layer.k, layer.v, layer.o)]
    norms = [each and each.weight for each in (layer.input_norm, layer.q_norm, layer.k_norm)]
    found: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        hidden, layer, rounded, angles, groups, shape, rooms, dtype, *norms, *parameters, *biases
    )
    return found


def mlp_block(
    hidden: Tensor, attended: Tensor, layer: Layer, rounded: Layer, dtype: torch.dtype
) -> Tensor:
    """Y + down(silu(gate(norm(y))) · up(norm(y))) for all tokens, with y = x + attention.

    y is formed here and not kept: attention's result is half as large in half precision.

    Args:
        hidden: x `(N, D)`, float32.
        attended: What `attention_block` has found, `(N, D)`.
        layer: Whose MLP.
        rounded: Its weights in the dtype of the products, or itself.
        dtype: Of the products.

    Returns:
        `(N, D)`, float32.
    """
    parts = (layer.gate, layer.up, layer.down)
    found: Tensor = _MLP.apply(  # type: ignore[no-untyped-call]
        hidden,
        attended,
        layer,
        rounded,
        dtype,
        layer.mlp_norm.weight,
        *(each.weight for each in parts),
        *(each.bias for each in parts),
    )
    return found


class _Attention(torch.autograd.Function):
    """See `attention_block`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        layer: Layer,
        rounded: Layer,
        angles: Angles,
        groups: list[Group],
        shape: Shape,
        rooms: Rooms,
        dtype: torch.dtype,
        *parameters: Tensor | None,
    ) -> Tensor:
        """Return `(N, D)`."""
        with torch.autocast("cpu", enabled=False):
            scale, weight, products = projected(hidden, layer, rounded, dtype)
            turned, values = rotated(products, layer, angles, shape)
            mixed = attend(turned, values, groups, shape, rooms).flatten(1)  # (N, H · E)
            out, out_bias = joined([rounded.o], dtype)
            result = linear(mixed, out, out_bias)  # (N, D)
        ctx.save_for_backward(hidden, scale, products, weight, out)
        ctx.given = (layer, angles, groups, shape, rooms, dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        hidden, scale, products, weight, out = ctx.saved_tensors
        layer, angles, groups, shape, rooms, dtype = ctx.given
        with torch.autocast("cpu", enabled=False):
            gradient = gradients[0]  # (N, D)
            mixed_grad = (gradient @ out).unflatten(1, (shape.heads, shape.size))
            turned, values = rotated(products, layer, angles, shape)
            turned_grad, values_grad, mixed = attend_backward(
                mixed_grad, turned, values, groups, shape, rooms
            )
            out_grad = (gradient.T @ mixed.flatten(1)).float()
            out_bias_grad = None if layer.o.bias is None else gradient.float().sum(dim=0)
            del turned
            products_grad, head_norms = _rotated_backward(
                turned_grad, values_grad, products, layer, angles, shape
            )
            del turned_grad, values_grad
            inputs = normed(hidden, scale, layer.input_norm.weight, dtype)  # (N, D)
            weights_grad = (products_grad.T @ inputs).float().split(_sizes(layer, _PARTS))
            biases_grad: tuple[Tensor | None, ...] = (None,) * 3
            if layer.q.bias is not None:
                biases_grad = products_grad.float().sum(dim=0).split(_sizes(layer, _PARTS))
            hidden_grad, norm_grad = normed_backward(
                products_grad @ weight, hidden, scale, layer.input_norm.weight
            )
        return (
            *(hidden_grad, None, None, None, None, None, None, None),
            *(norm_grad, *head_norms),
            *(*weights_grad, out_grad),
            *(*biases_grad, out_bias_grad),
        )


def _sizes(layer: Layer, names: str) -> list[int]:
    return [getattr(layer, name).out_features for name in names]


def projected(
    hidden: Tensor, layer: Layer, rounded: Layer, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of norm(x), before rotation.

    Args:
        hidden: x `(N, D)`, float32.
        layer: Whose attention.
        rounded: Its weights in the dtype of the products, or itself.
        dtype: Of the products.

    Returns:
        The scale of the norm `(N, 1)`, the joined weight `((H + 2 K) · E, D)` in the dtype, and the
        products `(N, (H + 2 K) · E)`.
    """
    scale = rms(hidden, layer.input_norm.variance_epsilon)
    inputs = normed(hidden, scale, layer.input_norm.weight, dtype)  # (N, D)
    weight, bias = joined([rounded.q, rounded.k, rounded.v], dtype)
    return scale, weight, linear(inputs, weight, bias)


def rotated(products: Tensor, layer: Layer, angles: Angles, shape: Shape) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys `(N, H + K, E)` in float32, and values `(N, K, E)`."""
    heads = products.unflatten(1, (-1, shape.size))  # (N, H + 2 K, E)
    values = heads[:, shape.turned :]
    if layer.q_norm is None:
        return rotate(heads[:, : shape.turned], *angles), values
    queries, keys = heads[:, : shape.heads].float(), heads[:, shape.heads : shape.turned].float()
    plain = [
        normed(each, rms(each, norm.variance_epsilon), norm.weight, torch.float32)
        for each, norm in ((queries, layer.q_norm), (keys, layer.k_norm))
    ]
    return rotate(torch.cat(plain, dim=1), *angles), values


def _rotated_backward(
    turned_grad: Tensor,
    values_grad: Tensor,
    products: Tensor,
    layer: Layer,
    angles: Angles,
    shape: Shape,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Gradients of `rotated` in the products, in their dtype, and in the norms of the heads."""
    gradient = torch.empty_like(products)  # (N, (H + 2 K) · E)
    by_head = gradient.unflatten(1, (-1, shape.size))
    by_head[:, shape.turned :] = values_grad
    back = rotate(turned_grad, angles.cosines, -angles.sines)  # the other way round
    if layer.q_norm is None:
        by_head[:, : shape.turned] = back
        return gradient, (None, None)
    heads = products.unflatten(1, (-1, shape.size))
    norms: list[Tensor] = []
    for part, norm in (
        (slice(0, shape.heads), layer.q_norm),
        (slice(shape.heads, shape.turned), layer.k_norm),
    ):
        inputs = heads[:, part].float()
        scale = rms(inputs, norm.variance_epsilon)
        by_head[:, part], of_weight = normed_backward(back[:, part], inputs, scale, norm.weight)
        norms.append(of_weight)
    return gradient, (norms[0], norms[1])


class _MLP(torch.autograd.Function):
    """See `mlp_block`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        attended: Tensor,
        layer: Layer,
        rounded: Layer,
        dtype: torch.dtype,
        *parameters: Tensor | None,
    ) -> Tensor:
        """Return `(N, D)`."""
        with torch.autocast("cpu", enabled=False):
            total = hidden + attended  # (N, D)
            scale = rms(total, layer.mlp_norm.variance_epsilon)  # (N, 1)
            inputs = normed(total, scale, layer.mlp_norm.weight, dtype)  # (N, D)
            weight, bias = joined([rounded.gate, rounded.up], dtype)
            products = linear(inputs, weight, bias)  # (N, 2 F)
            gate, up = products.chunk(2, dim=1)
            out, out_bias = joined([rounded.down], dtype)
            result = total.add_(linear(silu(gate).mul_(up), out, out_bias))  # (N, D)
        ctx.save_for_backward(hidden, attended, scale, products, weight, out)
        ctx.given = (layer, dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        hidden, attended, scale, products, weight, out = ctx.saved_tensors
        layer, dtype = ctx.given
        with torch.autocast("cpu", enabled=False):
            gradient = gradients[0].to(dtype)  # (N, D)
            gate, up = products.chunk(2, dim=1)
            opened = silu(gate)  # (N, F)
            out_grad = (gradient.T @ (opened * up)).float()
            out_bias_grad = None if layer.down.bias is None else gradients[0].sum(dim=0)
            active_grad = gradient @ out  # (N, F)
            products_grad = torch.empty_like(products)  # (N, 2 F)
            gate_grad, up_grad = products_grad.chunk(2, dim=1)
            torch.mul(active_grad, opened, out=up_grad)
            gate_grad.copy_(torch.ops.aten.silu_backward(active_grad.mul_(up), gate))
            del active_grad, opened
            total = hidden + attended  # (N, D)
            inputs = normed(total, scale, layer.mlp_norm.weight, dtype)  # (N, D)
            gate_weight, up_weight = (products_grad.T @ inputs).float().chunk(2)
            biases: tuple[Tensor | None, ...] = (None, None)
            if layer.gate.bias is not None:
                biases = products_grad.float().sum(dim=0).chunk(2)
            hidden_grad, norm_grad = normed_backward(
                products_grad @ weight, total, scale, layer.mlp_norm.weight
            )
            hidden_grad += gradients[0]
        return (
            *(hidden_grad, hidden_grad.to(attended.dtype), None, None, None, norm_grad),
            *(gate_weight, up_weight, out_grad),
            *(*biases, out_bias_grad),
        )
