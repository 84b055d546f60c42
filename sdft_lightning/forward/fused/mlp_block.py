"""The second half of a decoder layer, as one function with its gradient written down.

Products are made in the dtype of autocast, unless that is slow (see `products`); norms, rotations
and residual sums in float32. Of what lies in between only the results of products are kept for the
backward pass, in the dtype of autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from sdft_lightning.forward.fused.norm import normed, normed_backward, rms
from sdft_lightning.forward.fused.passes import Pass, Results
from sdft_lightning.forward.fused.structure import Layer
from sdft_lightning.forward.fused.walk import walk
from sdft_lightning.forward.fused.weights import Product, product_backward


def mlp_rows(
    hidden: Tensor,
    attended: Tensor,
    layer: Layer,
    rounded: Layer,
    run: Pass,
    known: Results | None = None,
) -> tuple[Results, tuple[Tensor, ...]]:
    """What `mlp_block` computes, without gradient; and its weights, those of `down` first."""
    done = 0 if known is None else known.out.shape[0]
    first = Product.of([rounded.gate, rounded.up], run.dtype)
    second = Product.of([rounded.down], run.dtype)
    weights = (second.weights[0], *first.weights)
    if known is not None and done == hidden.shape[0]:
        return known, weights
    total = hidden[done:] + attended[done:]
    scale = rms(total, layer.mlp_norm.variance_epsilon)
    inputs = normed(total, scale, layer.mlp_norm.weight, run.dtype)
    products = first(inputs).to(run.kept)  # (N, 2 F)
    active = inputs.new_empty(products.shape[0], products.shape[1] // 2)  # (N, F)
    for rows, piece in walk([products]):
        gate, up = piece.to(run.dtype).chunk(2, dim=1)
        torch.mul(silu(gate), up, out=active[rows])
    result = total.add_(second(active))  # (N, D)
    if known is None:
        return Results(scale, (products,), result), weights
    found = Results(
        torch.cat([known.scale, scale]),
        (*known.products, products),
        torch.cat([known.out, result]),
    )
    return found, weights


def mlp_block(
    hidden: Tensor,
    attended: Tensor,
    layer: Layer,
    rounded: Layer,
    run: Pass,
    known: Results | None = None,
) -> Tensor:
    """Y + down(silu(gate(norm(y))) · up(norm(y))) for all tokens, with y = x + attention.

    y is formed here and not kept: attention's result is half as large in half precision.

    Args:
        hidden: x `(N, D)`, float32.
        attended: What `attention_block` has found, `(N, D)`.
        layer: Whose MLP.
        rounded: Its weights in the dtype of the products, or itself.
        run: The pass.
        known: What was found for the first tokens before; only the others are computed.

    Returns:
        `(N, D)`, float32.
    """
    parts = (layer.gate, layer.up, layer.down)
    found: Tensor = _MLP.apply(  # type: ignore[no-untyped-call]
        hidden,
        attended,
        layer,
        rounded,
        run,
        known,
        layer.mlp_norm.weight,
        *(each.weight for each in parts),
        *(each.bias for each in parts),
    )
    return found


class _MLP(torch.autograd.Function):
    """See `mlp_block`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        attended: Tensor,
        layer: Layer,
        rounded: Layer,
        run: Pass,
        known: Results | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        """Return `(N, D)`."""
        with torch.autocast("cpu", enabled=False):
            found, weights = mlp_rows(hidden, attended, layer, rounded, run, known)
        ctx.save_for_backward(hidden, attended, found.scale, *weights, *found.products)
        ctx.given = (layer, run, len(weights))
        return found.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        hidden, attended, scale, *more = ctx.saved_tensors
        layer, run, split = ctx.given
        dtype, (out, *weights), products = run.dtype, more[:split], more[split:]
        with torch.autocast("cpu", enabled=False):
            gradient = gradients[0].to(dtype)  # (N, D)
            count, width = gradient.shape[0], out.shape[1]  # N, F
            active_grad = run.buffers.take("active grad", (count, width), dtype)
            torch.mm(gradient, out.to(dtype), out=active_grad)
            active = run.buffers.take("active", (count, width), dtype)
            products_grad = run.buffers.take("products grad", (count, 2 * width), dtype)
            for rows, piece in walk(products):
                piece = piece.to(dtype)
                _gate_backward(piece, active_grad[rows], active[rows], products_grad[rows])
            out_grad = (gradient.T @ active).float()
            out_bias_grad = None if layer.down.bias is None else gradients[0].sum(dim=0)
            total = hidden + attended  # (N, D)
            inputs = normed(total, scale, layer.mlp_norm.weight, dtype)  # (N, D)
            gate_weight, up_weight = (products_grad.T @ inputs).float().chunk(2)
            biases: tuple[Tensor | None, ...] = (None, None)
            if layer.gate.bias is not None:
                biases = products_grad.float().sum(dim=0).chunk(2)
            hidden_grad, norm_grad = normed_backward(
                product_backward(products_grad, weights), total, scale, layer.mlp_norm.weight
            )
            hidden_grad += gradients[0]
        return (
            *(hidden_grad, hidden_grad.to(attended.dtype), None, None, None, None, norm_grad),
            *(gate_weight, up_weight, out_grad),
            *(*biases, out_bias_grad),
        )


def _gate_backward(products: Tensor, gradient: Tensor, active: Tensor, found: Tensor) -> None:
    """silu(gate) · up once more, and the gradients in gate and up.

    Args:
        products: Gate and up `(N, 2 F)`.
        gradient: `(N, F)` of silu(gate) · up; written over.
        active: `(N, F)`, where that goes.
        found: `(N, 2 F)`, where the gradients go.
    """
    gate, up = products.chunk(2, dim=1)
    gate_grad, up_grad = found.chunk(2, dim=1)
    opened = silu(gate)
    torch.mul(opened, up, out=active)
    torch.mul(gradient, opened, out=up_grad)
    torch.ops.aten.silu_backward.grad_input(gradient.mul_(up), gate, grad_input=gate_grad)
