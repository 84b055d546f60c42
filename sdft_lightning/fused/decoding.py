"""Decoding one token a row in few operations, with room for keys and values made beforehand.

Weights are rearranged once a rollout for few rows (see `rollout.packed`), queries, keys and values
are one product, and residual sums and the gate are part of products. Attention is computed in
float32; of a bfloat16 cache one layer at a time is cast, into the same memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad, rms_norm

from sdft_lightning.fused.attention import Shape, rotate
from sdft_lightning.fused.norm import normed, rms
from sdft_lightning.fused.structure import Decoder, Layer, joined
from sdft_lightning.fused.trunk import prompt_states
from sdft_lightning.prefix import SplitPrompts

# Tokens that room is made for at once: most completions end long before the longest allowed.
_MORE = 64


class _Product(NamedTuple):
    """A linear layer, its weight laid out by oneDNN."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(parts: list[Any], rows: int) -> _Product:
        """Of layers with the same input, for so many rows at a time."""
        weight, bias = joined(parts, parts[0].weight.dtype)
        return _Product(torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias)

    def __call__(self, inputs: Tensor, after: str = "none") -> Tensor:
        """W x + b, then `swish` where it is asked for."""
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self.weight, self.bias, after, [], ""
        )
        return outputs

    def with_(self, inputs: Tensor, other: Tensor, operation: str) -> Tensor:
        """W x + b, to which `other` is added (`add`) or by which it is multiplied (`mul`)."""
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            inputs, other, self.weight, self.bias, operation
        )
        return outputs


class _PackedLayer(NamedTuple):
    """The products of a layer, and its modules for the norms."""

    layer: Layer
    heads: _Product
    out: _Product
    gate: _Product
    up: _Product
    down: _Product

    @staticmethod
    def of(layer: Layer, rows: int) -> _PackedLayer:
        """Lay a layer out for so many rows."""
        parts = ([layer.q, layer.k, layer.v], [layer.o], [layer.gate], [layer.up], [layer.down])
        return _PackedLayer(layer, *(_Product.of(list(each), rows) for each in parts))


class DecodingSteps:
    """Keys and values of some rows, and what comes next in each.

    Args:
        decoder: Of the model, see `decoder_of`; its weights do not change meanwhile.
        head: The model's output layer.
        prompts: The prompts, less what all begin with.
        samples: Completions of each (n).
        steps: Most tokens that will be appended.

    Attributes:
        logits: `(B · n, V)` of what follows the prompts.
    """

    def __init__(
        self, decoder: Decoder, head: Any, prompts: SplitPrompts, samples: int, steps: int
    ) -> None:
        dtype = head.weight.dtype
        states = prompt_states(decoder, prompts, dtype)
        order = states.order.repeat_interleave(samples, dim=0)  # (S, L)
        mask = states.mask.repeat_interleave(samples, dim=0)  # (S, L)
        self.decoder = decoder
        self.shape = Shape(decoder.heads, decoder.key_heads, decoder.head_size)
        rows, self.length = mask.shape
        self.layers = [_PackedLayer.of(layer, rows) for layer in decoder.layers]
        self.head = _Product.of([head], rows)
        self.longest = self.length + steps
        size = min(self.length + _MORE, self.longest)
        room = (rows, decoder.key_heads, size, decoder.head_size)
        self.keys = [torch.empty(room, dtype=dtype) for _ in self.layers]
        self.values = [torch.empty(room, dtype=dtype) for _ in self.layers]
        self.wide = _wide(0 if dtype == torch.float32 else 2 * self.keys[0].numel())
        for kept, found in ((self.keys, states.keys), (self.values, states.values)):
            for room_of_layer, of_tokens in zip(kept, found, strict=True):
                room_of_layer[:, :, : self.length] = of_tokens[order].transpose(1, 2)
        self.positions = mask.sum(dim=1)  # (S,) of the next token
        unseen = (rows, decoder.key_heads, 1, size)
        self.unseen = torch.zeros(unseen, dtype=torch.float32)  # added to the scores
        self.unseen[:, :, 0, : self.length].masked_fill_(~mask.unsqueeze(1), float("-inf"))
        self.logits = self.head(states.last.to(dtype)).repeat_interleave(samples, dim=0)

    def _grow(self) -> None:
        """Make room for more keys and values, layer by layer."""
        more = min(_MORE, self.longest - self.length)
        for rooms in (self.keys, self.values):
            for place, room in enumerate(rooms):
                rooms[place] = pad(room, (0, 0, 0, more))
        self.unseen = pad(self.unseen, (0, more))
        if self.wide.numel():
            self.wide = _wide(2 * self.keys[0].numel())

    def select(self, slots: Tensor) -> None:
        """Keep some rows only.

        Args:
            slots: `(n,)` ascending.
        """
        count = slots.numel()
        for rooms in (self.keys, self.values):
            for place, room in enumerate(rooms):
                # In place: what is behind the last key is not read, and need not be moved.
                room[:count, :, : self.length] = room[slots, :, : self.length]
                rooms[place] = room[:count]
        self.positions, self.unseen = self.positions[slots], self.unseen[slots]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append a token to each row.

        Args:
            tokens: `(S,)`.

        Returns:
            Logits `(S, V)`.
        """
        decoder, turned = self.decoder, self.shape.turned
        if self.length == self.keys[0].shape[2]:
            self._grow()
        hidden = embedding(tokens, decoder.embedding.weight)  # (S, D)
        cosines, sines = (
            each[:, 0, : self.shape.size // 2].unsqueeze(1).float()  # (S, 1, E / 2)
            for each in decoder.rotary(hidden.float(), self.positions.unsqueeze(1))
        )
        for packed, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            layer = packed.layer
            products = packed.heads(_norm(hidden, layer.input_norm))
            heads = products.unflatten(1, (-1, self.shape.size))  # (S, H + 2 K, E)
            rotated = rotate(self._head_norms(heads[:, :turned], layer), cosines, sines)
            keys[:, :, self.length] = rotated[:, self.shape.heads :]
            values[:, :, self.length] = heads[:, turned:]
            mixed = self._attend(rotated[:, : self.shape.heads], keys, values).to(hidden.dtype)
            hidden = packed.out.with_(mixed, hidden, "add")
            inputs = _norm(hidden, layer.mlp_norm)
            active = packed.up.with_(inputs, packed.gate(inputs, "swish"), "mul")  # (S, F)
            hidden = packed.down.with_(active, hidden, "add")
        self.length += 1
        self.positions = self.positions + 1
        return self.head(_norm(hidden, decoder.norm))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`(S, H · E)` of queries `(S, H, E)`, the newest key included."""
        rows, groups, seen = queries.shape[0], self.shape.key_heads, self.length + 1
        grouped = queries.reshape(rows * groups, -1, self.shape.size)  # (S · K, H / K, E)
        wide_keys, wide_values = self._widened(keys, values, seen)  # (S · K, l, E)
        scores = torch.baddbmm(
            self.unseen.flatten(0, 1)[:, :, :seen],  # (S · K, 1, l)
            grouped,
            wide_keys.transpose(1, 2),
            alpha=self.shape.size**-0.5,
        )  # (S · K, H / K, l)
        # `bmm` itself: the operator @ would copy the values first.
        return torch.bmm(scores.softmax(dim=-1), wide_values).view(rows, -1)

    def _widened(self, keys: Tensor, values: Tensor, seen: int) -> list[Tensor]:
        """What is seen, in float32: `(S · K, l, E)` of `(S, K, ≥ l, E)`."""
        parts = [each.flatten(0, 1)[:, :seen] for each in (keys, values)]
        if keys.dtype == torch.float32:
            return parts
        size = parts[0].numel()
        rooms = (self.wide[:size], self.wide[size : 2 * size])
        pairs = zip(rooms, parts, strict=True)
        return [room.view(part.shape).copy_(part) for room, part in pairs]

    def _head_norms(self, heads: Tensor, layer: Layer) -> Tensor:
        """Queries and keys `(S, H + K, E)`, normed where the model does."""
        if layer.q_norm is None:
            return heads
        parts = heads.float().split([self.shape.heads, self.shape.key_heads], dim=1)
        plain = [
            normed(part, rms(part, norm.variance_epsilon), norm.weight, torch.float32)
            for part, norm in zip(parts, (layer.q_norm, layer.k_norm), strict=True)
        ]
        return torch.cat(plain, dim=1)


def _wide(count: int) -> Tensor:
    """Memory for float32, whatever the default dtype is (Lightning's bf16-true changes it)."""
    return torch.empty(count, dtype=torch.float32)


def _norm(hidden: Tensor, norm: Any) -> Tensor:
    return rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
