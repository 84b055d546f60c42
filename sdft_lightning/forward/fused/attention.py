"""Causal attention over tokens without padding, with rotary positions, and its gradient.

Scores are float32, as in torch's flash kernel, and are computed again in the backward pass: nothing
but queries, keys and values is kept. Probabilities are rounded to the dtype of the values, as
there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.fused.rows import Group


class Shape(NamedTuple):
    """Heads of a layer: H query heads, K heads of keys and of values, E numbers each."""

    heads: int
    key_heads: int
    size: int

    @property
    def turned(self) -> int:
        """Heads that are rotated: queries and keys."""
        return self.heads + self.key_heads


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate halves of heads `(N, H, E)` by angles given as `(N, 1, E / 2)`, in float32."""
    left, right = heads.to(cosines.dtype).chunk(2, dim=-1)  # once; every product would cast anew
    turned = torch.empty(heads.shape, dtype=cosines.dtype) if out is None else out  # (N, H, E)
    to_left, to_right = turned.chunk(2, dim=-1)
    torch.mul(left, cosines, out=to_left).addcmul_(right, sines, value=-1)
    torch.mul(right, cosines, out=to_right).addcmul_(left, sines)
    return turned


class Buffers:
    """Memory to work in, used again from one group and layer to the next.

    The system's zeroing of new pages took as long as the products that wrote to them.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor with anything in it, valid until the same name is taken again."""
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != dtype:
            kept = self._kept[name] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in a dtype: itself, or a copy."""
        if tensor.dtype == dtype:
            return tensor
        return self.take(name, tensor.shape, dtype).copy_(tensor)


class _Blocks:
    """Queries, keys and values of one group, laid out for products over its heads."""

    def __init__(
        self, group: Group, shape: Shape, turned: Tensor, values: Tensor, buffers: Buffers
    ) -> None:
        self.group, self.shape, self.buffers = group, shape, buffers
        self.repeats = shape.heads // shape.key_heads  # R
        self.scaling = shape.size**-0.5
        self.queries = self.by_head("queries", turned[:, : shape.heads])  # (G, K, R, L, E)
        self.queries.mul_(self.scaling)
        self.keys = self.seen("keys", turned[:, shape.heads :])  # (G · K, S, E)
        self.values = self.seen("values", values)  # (G · K, S, E)

    def by_head(self, name: str, tokens: Tensor) -> Tensor:
        """`(G, K, R, L, E)` of `(N, H, E)`, a copy."""
        padded = self.group.padded(tokens).unflatten(2, (self.shape.key_heads, self.repeats))
        padded = padded.permute(0, 2, 3, 1, 4)
        return self.buffers.take(name, padded.shape, padded.dtype).copy_(padded)

    def seen(self, name: str, tokens: Tensor) -> Tensor:
        """What each of the group sees: `(G · K, S, E)` of `(N, K, E)`, its own tokens last."""
        group, shared, before = self.group, self.group.shared, self.group.before
        shape = (group.rows, self.shape.key_heads, before + group.length, self.shape.size)
        buffer = self.buffers.take(name, shape, tokens.dtype)  # (G, K, S, E)
        buffer[:, :, :shared] = tokens[:shared].transpose(0, 1)
        if before > shared:
            buffer[:, :, shared:before] = tokens[group.context].transpose(1, 2)
        buffer[:, :, before:] = group.padded(tokens).transpose(1, 2)
        return buffer.flatten(0, 1)

    def part(self, name: str, by_head: Tensor, queries: slice) -> Tensor:
        """`(G · K, R · l, E)` of some queries."""
        chosen = by_head[:, :, :, queries]  # (G, K, R, l, E)
        buffer = self.buffers.take(name, chosen.shape, chosen.dtype).copy_(chosen)
        return buffer.flatten(2, 3).flatten(0, 1)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Left times right, batch by batch."""
        shape = (left.shape[0], left.shape[1], right.shape[2])
        return torch.bmm(left, right, out=self.buffers.take(name, shape, left.dtype))

    def probs(self, queries: Tensor, part: slice, seen: int) -> Tensor:
        """Attention probabilities `(G · K, R · l, s)` of some queries over the first keys."""
        scores = self.product("scores", queries, self.keys[:, :seen].transpose(1, 2))
        group, count = self.group, part.stop - part.start
        if group.padding is not None:
            of_rows = scores.view(group.rows, -1, seen)  # (G, K · R · l, s)
            of_rows[:, :, group.shared : group.before] += group.padding.unsqueeze(1)
        # All see what came before these queries; of the queries' own keys, those up to their own.
        later = torch.full((count, count), float("-inf"), dtype=scores.dtype)
        later = later.triu_(1)  # (l, l) query, key
        scores.view(-1, count, seen)[:, :, seen - count :].add_(later)
        return torch.softmax(scores, dim=-1, out=self.buffers.take("probs", scores.shape))

    def stored(self, by_head: Tensor, tokens: Tensor) -> None:
        """Write `(G, K, R, L, E)` into the group's part of `(N, H, E)`."""
        self.group.store(tokens, by_head.permute(0, 3, 1, 2, 4).flatten(2, 3))


def attend(
    turned: Tensor, values: Tensor, groups: list[Group], shape: Shape, buffers: Buffers
) -> Tensor:
    """Attention of every token to those before it in its sequence, and to the shared ones.

    Args:
        turned: `(N, H + K, E)` rotated queries and keys, float32.
        values: `(N, K, E)`.
        groups: How the tokens belong together.
        shape: Heads.
        buffers: Memory to work in.

    Returns:
        `(N, H, E)` in the dtype of the values.
    """
    mixed = values.new_empty(values.shape[0], shape.heads, shape.size)  # (N, H, E)
    for group in groups:
        blocks = _Blocks(group, shape, turned, values, buffers)
        found = buffers.take("found", blocks.queries.shape, values.dtype)
        for part, seen in group.blocks(shape.heads):
            probs = blocks.probs(blocks.part("part", blocks.queries, part), part, seen)
            probs = buffers.cast("rounded", probs, values.dtype)
            product = blocks.product("product", probs, blocks.values[:, :seen])  # (G · K, R · l, E)
            found[:, :, :, part] = product.view(found[:, :, :, part].shape)
        blocks.stored(found, mixed)
    return mixed


def attend_backward(
    gradient: Tensor,
    turned: Tensor,
    values: Tensor,
    groups: list[Group],
    shape: Shape,
    buffers: Buffers,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` in rotated queries and keys, and in values; and its result once more.

    Args:
        gradient: `(N, H, E)` of its result.
        turned: As there.
        values: As there.
        groups: As there.
        shape: Heads.
        buffers: Memory to work in.

    Returns:
        `(N, H + K, E)` and `(N, K, E)`, float32, and `(N, H, E)`; all of the buffers.
    """
    heads, dtype, wide = shape.heads, values.dtype, turned.dtype
    # Each token is in one group, which writes its place, before later ones add to shared places.
    turned_grad = buffers.take("turned grad", turned.shape)  # (N, H + K, E)
    values_grad = buffers.take("all values grad", values.shape)  # (N, K, E)
    mixed = buffers.take("mixed", gradient.shape, dtype)  # (N, H, E)
    for group in groups:
        blocks = _Blocks(group, shape, turned, values, buffers)
        found = buffers.take("found", blocks.queries.shape, dtype)  # (G, K, R, L, E)
        wanted = blocks.by_head("wanted", gradient)  # (G, K, R, L, E)
        rounded_keys = buffers.cast("rounded keys", blocks.keys, dtype)
        wide_values = buffers.cast("wide values", blocks.values, wide)
        queries_grad = buffers.take("queries grad", blocks.queries.shape)
        keys_grad = buffers.take("keys grad", blocks.keys.shape).zero_()  # (G · K, S, E)
        seen_grad = buffers.take("values grad", blocks.keys.shape).zero_()  # (G · K, S, E)
        for part, seen in group.blocks(heads):
            queries = blocks.part("part", blocks.queries, part)  # (G · K, R · l, E)
            given = blocks.part("given", wanted, part)  # (G · K, R · l, E)
            probs = blocks.probs(queries, part, seen)  # (G · K, R · l, s)
            wide_given = buffers.cast("wide given", given, wide)
            probs_grad = blocks.product("scores", wide_given, wide_values[:, :seen].transpose(1, 2))
            scores_grad = _softmax_backward(probs_grad, probs, buffers)
            scores_grad = buffers.cast("rounded grad", scores_grad, dtype)
            rounded = buffers.cast("rounded", probs, dtype)
            product = blocks.product("product", rounded, blocks.values[:, :seen])
            found[:, :, :, part] = product.view(found[:, :, :, part].shape)
            seen_grad[:, :seen] += blocks.product("of values", rounded.transpose(1, 2), given)
            queries = buffers.cast("rounded queries", queries, dtype)
            keys_grad[:, :seen] += blocks.product("of keys", scores_grad.transpose(1, 2), queries)
            product = blocks.product("product", scores_grad, rounded_keys[:, :seen])
            queries_grad[:, :, :, part] = product.view(queries_grad[:, :, :, part].shape)
        blocks.stored(queries_grad.mul_(blocks.scaling), turned_grad[:, :heads])
        blocks.stored(found, mixed)
        _add_seen(keys_grad, turned_grad[:, heads:], group, shape)
        _add_seen(seen_grad, values_grad, group, shape)
    return turned_grad, values_grad, mixed


def _softmax_backward(gradient: Tensor, probs: Tensor, buffers: Buffers) -> Tensor:
    """P · (g − Σ P g), the gradient in the scores."""
    buffer = buffers.take("scores grad", probs.shape)
    operator = torch.ops.aten._softmax_backward_data.out
    found: Tensor = operator(gradient, probs, -1, probs.dtype, grad_input=buffer)
    return found


def _add_seen(gradient: Tensor, tokens: Tensor, group: Group, shape: Shape) -> None:
    """Hand `(G · K, S, E)` out to the tokens `(N, K, E)` that were seen."""
    by_row = gradient.view(group.rows, shape.key_heads, -1, shape.size)  # (G, K, S, E)
    shared, before = group.shared, group.before
    if shared:
        tokens[:shared] += by_row[:, :, :shared].sum(dim=0).transpose(0, 1)
    if before > shared:  # padding has no gradient, so it may be added anywhere
        context = by_row[:, :, shared:before].transpose(1, 2).flatten(0, 1)  # (G · C, K, E)
        tokens.index_add_(0, group.context.flatten(), context.to(tokens.dtype))
    group.store(tokens, by_row[:, :, before:].transpose(1, 2))
