"""The two halves of a decoder layer, each as one function with its gradient written down.

Products are made in the dtype of autocast, unless that is slow (see `precision`); norms, rotations
and residual sums in float32. Of what lies in between only the results of products are stored for
the backward pass, in the dtype of autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from sdft_lightning.forward.fused.attention import attend, attend_backward, rotate
from sdft_lightning.forward.fused.common import Pass, Results, normed, normed_backward, rms, walk
from sdft_lightning.forward.fused.structure import Layer, Product, product_backward

_PARTS = "qkv"


class Attended(NamedTuple):
    """What `attend_rows` has found.

    Attributes:
        results: Of all tokens.
        weights: Of the two products, those of the second first.
        turned: Rotated queries and keys `(N, H + K, E)`, float32; nothing where all was known.
        values: `(N, K, E)`, or nothing.
    """

    results: Results
    weights: tuple[Tensor, ...]
    turned: Tensor = torch.empty(0)
    values: Tensor = torch.empty(0)


def attend_rows(
    hidden: Tensor, layer: Layer, rounded: Layer, run: Pass, known: Results | None = None
) -> Attended:
    """attention(norm(x)) for all tokens, without gradient.

    Args:
        hidden: x `(N, D)`, float32.
        layer: Whose attention.
        rounded: Its weights in the dtype of the products, or itself.
        run: The pass.
        known: What was found for the first tokens before; only the others are computed.
    """
    done = 0 if known is None else known.out.shape[0]
    first, second = _products(rounded, run.dtype)
    weights = (second.weights[0], *first.weights)
    if known is not None and done == hidden.shape[0]:
        return Attended(known, weights)
    fresh = hidden[done:]
    scale = rms(fresh, layer.input_norm.variance_epsilon)
    inputs = normed(fresh, scale, layer.input_norm.weight, run.dtype)
    products: tuple[Tensor, ...] = (first(inputs).to(run.stored),)
    if known is not None:
        scale, products = torch.cat([known.scale, scale]), known.products + products
    turned, values = rotated(products, layer, run, done)
    groups = [group for group in run.groups if group.start >= done]
    mixed = attend(turned, values.to(run.dtype), groups, run.shape, run.buffers)[done:].flatten(1)
    out = second(mixed).to(run.stored)
    if known is not None:
        out = torch.cat([known.out, out])
    return Attended(Results(scale, products, out), weights, turned, values)


def attend_after(hidden: Tensor, layer: Layer, run: Pass, keys: Tensor, values: Tensor) -> Tensor:
    """attention(norm(x)) of tokens behind others whose keys and values are known; no gradient.

    Args:
        hidden: x `(N, D)`, float32.
        layer: Whose attention.
        run: The pass over these tokens; its groups count the M others, too, which are the first.
        keys: `(M, K, E)`, rotated, float32.
        values: `(M, K, E)`.

    Returns:
        `(N, D)` in the dtype that products are stored in.
    """
    count, heads = keys.shape[0], run.shape.heads
    first, second = _products(layer, run.dtype)
    scale = rms(hidden, layer.input_norm.variance_epsilon)
    inputs = normed(hidden, scale, layer.input_norm.weight, run.dtype)
    mine, more = rotated((first(inputs).to(run.stored),), layer, run)
    turned = mine.new_empty(count + mine.shape[0], run.shape.turned, run.shape.size)
    turned[:count, heads:], turned[count:] = keys, mine
    every = torch.cat([values.to(run.dtype), more.to(run.dtype)])  # (M + N, K, E)
    mixed = attend(turned, every, run.groups, run.shape, run.buffers)[count:]
    return second(mixed.flatten(1)).to(run.stored)


def _products(layer: Layer, dtype: torch.dtype) -> tuple[Product, Product]:
    return Product.of([layer.q, layer.k, layer.v], dtype), Product.of([layer.o], dtype)


def attention_block(
    hidden: Tensor, layer: Layer, rounded: Layer, run: Pass, known: Results | None = None
) -> Tensor:
    """attention(norm(x)) for all tokens; arguments as of `attend_rows`.

    Returns:
        `(N, D)` in the dtype that products are stored in.
    """
    parameters = [each.weight for each in (layer.q, layer.k, layer.v, layer.o)]
    biases = [each.bias for each in (layer.q, layer.k, layer.v, layer.o)]
    norms = [each and each.weight for each in (layer.input_norm, layer.q_norm, layer.k_norm)]
    found: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        hidden, layer, rounded, run, known, *norms, *parameters, *biases
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
        run: Pass,
        known: Results | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        """Return `(N, D)`."""
        with torch.autocast("cpu", enabled=False):
            found = attend_rows(hidden, layer, rounded, run, known)
        results = found.results
        ctx.save_for_backward(hidden, results.scale, *found.weights, *results.products)
        ctx.given = (layer, run, len(found.weights))
        return results.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        hidden, scale, *more = ctx.saved_tensors
        layer, run, count = ctx.given
        (out, *weights), products = more[:count], more[count:]
        shape = run.shape
        with torch.autocast("cpu", enabled=False):
            gradient = gradients[0].to(run.dtype)  # (N, D)
            mixed_grad = product_backward(gradient, [out])
            mixed_grad = mixed_grad.unflatten(1, (shape.heads, shape.size))
            turned, values = rotated(products, layer, run)
            turned_grad, values_grad, mixed = attend_backward(
                mixed_grad, turned, values.to(run.dtype), run.groups, shape, run.buffers
            )
            out_grad = (gradient.T @ mixed.flatten(1)).float()
            out_bias_grad = None if layer.o.bias is None else gradient.float().sum(dim=0)
            del turned
            products_grad, head_norms = _rotated_backward(
                turned_grad, values_grad, products, layer, run
            )
            del turned_grad, values_grad
            inputs = normed(hidden, scale, layer.input_norm.weight, run.dtype)  # (N, D)
            weights_grad = (products_grad.T @ inputs).float().split(_sizes(layer, _PARTS))
            biases_grad: tuple[Tensor | None, ...] = (None,) * 3
            if layer.q.bias is not None:
                biases_grad = products_grad.float().sum(dim=0).split(_sizes(layer, _PARTS))
            hidden_grad, norm_grad = normed_backward(
                product_backward(products_grad, weights), hidden, scale, layer.input_norm.weight
            )
        return (
            *(hidden_grad, None, None, None, None),
            *(norm_grad, *head_norms),
            *(*weights_grad, out_grad),
            *(*biases_grad, out_bias_grad),
        )


def _sizes(layer: Layer, names: str) -> list[int]:
    return [getattr(layer, name).out_features for name in names]


def rotated(
    products: Sequence[Tensor], layer: Layer, run: Pass, asked: int = 0
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys `(N, H + K, E)` in float32, and values `(N, K, E)`.

    Args:
        products: Queries, keys and values, in one or several pieces.
        layer: Whose attention.
        run: The pass.
        asked: Tokens at the beginning whose queries are not wanted; anything may be there.
    """
    shape, heads = run.shape, run.shape.heads
    values = [piece.unflatten(1, (-1, shape.size))[:, shape.turned :] for piece in products]
    count = sum(piece.shape[0] for piece in products)
    turned = torch.empty(count, shape.turned, shape.size, dtype=torch.float32)
    for rows, piece in walk(products):
        by_head = piece.unflatten(1, (-1, shape.size))  # (n, H + 2 K, E)
        cosines, sines = run.angles.cosines[rows], run.angles.sines[rows]
        if rows.start >= asked:
            queries = _head_normed(by_head[:, :heads], layer.q_norm)
            rotate(queries, cosines, sines, out=turned[rows, :heads])
        keys = _head_normed(by_head[:, heads : shape.turned], layer.k_norm)
        rotate(keys, cosines, sines, out=turned[rows, heads:])
    return turned, values[0] if len(values) == 1 else torch.cat(values)


def _head_normed(heads: Tensor, norm: Any) -> Tensor:
    """Queries or keys `(N, H, E)`, normed where the model does."""
    if norm is None:
        return heads
    wide = heads.float()
    return normed(wide, rms(wide, norm.variance_epsilon), norm.weight, torch.float32)


def _rotated_backward(
    turned_grad: Tensor,
    values_grad: Tensor,
    products: Sequence[Tensor],
    layer: Layer,
    run: Pass,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Gradients of `rotated` in the products, to be multiplied, and in the norms of the heads."""
    shape, angles = run.shape, run.angles
    count, size = turned_grad.shape[0], products[0].shape[1]
    gradient = products[0].new_empty(count, size, dtype=run.dtype)  # (N, (H + 2 K) · E)
    by_head = gradient.unflatten(1, (-1, shape.size))
    by_head[:, shape.turned :] = values_grad
    if layer.q_norm is None:
        for rows, piece in walk([turned_grad.flatten(1)]):
            back = piece.unflatten(1, (-1, shape.size))  # the other way round
            by_head[rows, : shape.turned] = rotate(back, angles.cosines[rows], -angles.sines[rows])
        return gradient, (None, None)
    back = rotate(turned_grad, angles.cosines, -angles.sines)
    heads = torch.cat(list(products)).unflatten(1, (-1, shape.size))
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
    products = first(inputs).to(run.stored)  # (N, 2 F)
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
