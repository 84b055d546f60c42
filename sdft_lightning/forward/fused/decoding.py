"""Decoding one token a row in few operations, with buffers for keys and values made beforehand.

Weights are rearranged once a rollout for few rows; queries, keys and values are one product, and so
are gate and up. Norms, residual sums and attention are computed in float32, as in training, so that
what a step finds can be what training begins with (see `reuse`). Of a bfloat16 cache one layer
at a time is cast, into the same memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad, silu

from sdft_lightning.forward.fused.attention import Shape, rotate
from sdft_lightning.forward.fused.common import normed, rms
from sdft_lightning.forward.fused.reuse import ReadPrompts, Recording, recorded_rows, store_steps
from sdft_lightning.forward.fused.structure import Decoder, LaidOut, LaidOutLayer, Layer
from sdft_lightning.forward.kv_cache import Decoding
from sdft_lightning.models.precision import product_dtype
from sdft_lightning.types import Tokens

# Tokens that buffers grow by: most completions end long before the longest allowed.
_MORE = 64


class DecodingSteps(Decoding):
    """Keys and values of some rows, and what comes next in each.

    Args:
        decoder: Of the model that samples, see `decoder_of`; its weights do not change meanwhile.
            Embeddings and norms are those that the prompts were read with.
        head: The model's output layer.
        prompts: The prompts, in one piece or several; their keys and values are dropped.
        samples: Completions of each (n).
        steps: Most tokens that will be appended.

    Attributes:
        logits: `(B · n, V)` of what follows the prompts.
    """

    def __init__(
        self, decoder: Decoder, head: Any, prompts: list[ReadPrompts], samples: int, steps: int
    ) -> None:
        self.dtype = dtype = product_dtype(head.weight.dtype)
        self.stored = prompts[0].stored  # results are rounded before they are used, as in training
        self.decoder = prompts[0].decoder
        self.prompts, self.samples = prompts, samples
        self.shape = Shape(decoder.heads, decoder.key_heads, decoder.head_size)
        rows = samples * sum(len(part.rows.owner) for part in prompts)  # S
        self.length = max(part.rows.width for part in prompts)
        self.rows = torch.arange(rows)  # (S,) which row is in which place
        self.recording = Recording(len(decoder.layers), recorded_rows(prompts, samples))
        self.layers = [LaidOutLayer.of(layer, rows) for layer in decoder.layers]
        self.head = LaidOut.of([head], rows)
        self.longest = self.length + steps
        size = min(self.length + _MORE, self.longest)
        shape = (rows, decoder.key_heads, size, decoder.head_size)
        self.keys = [torch.empty(shape, dtype=dtype) for _ in self.layers]
        self.values = [torch.empty(shape, dtype=dtype) for _ in self.layers]
        self.wide = _wide(0 if dtype == torch.float32 else 2 * self.keys[0].numel())
        self.unseen = _wide(rows * decoder.key_heads * size).zero_()  # added to the scores
        self.unseen = self.unseen.view(rows, decoder.key_heads, 1, size)
        masks = []
        for part, place in zip(prompts, _places(prompts, samples), strict=True):
            order, mask = (
                each.repeat_interleave(samples, dim=0) for each in part.rows.padded(self.length)
            )  # (S_i, L)
            masks.append(mask)
            for kept, found in ((self.keys, part.keys), (self.values, part.values)):
                for buffer_of_layer, of_tokens in zip(kept, found, strict=True):
                    buffer_of_layer[place, :, : self.length] = of_tokens[order].transpose(1, 2)
            part.forget_keys()
        mask = torch.cat(masks)  # (S, L)
        self.positions = mask.sum(dim=1)  # (S,) of the next token
        self.unseen[:, :, 0, : self.length].masked_fill_(~mask.unsqueeze(1), float("-inf"))
        last = torch.cat([part.last for part in prompts]).to(dtype)  # (B, D)
        self.logits = self.head(last).repeat_interleave(samples, dim=0)

    def _grow(self) -> None:
        """Enlarge the buffers of keys and values, layer by layer."""
        more = min(_MORE, self.longest - self.length)
        for buffers in (self.keys, self.values):
            for place, buffer in enumerate(buffers):
                buffers[place] = pad(buffer, (0, 0, 0, more))
        self.unseen = pad(self.unseen, (0, more))
        if self.wide.numel():
            self.wide = _wide(2 * self.keys[0].numel())

    def keep(self, rows: Tensor) -> None:
        """Keep some rows only.

        Args:
            rows: `(n,)` ascending.
        """
        count = rows.numel()
        for buffers in (self.keys, self.values):
            for place, buffer in enumerate(buffers):
                # In place: what is behind the last key is not read, and need not be moved.
                buffer[:count, :, : self.length] = buffer[rows, :, : self.length]
                buffers[place] = buffer[:count]
        self.positions, self.unseen = self.positions[rows], self.unseen[rows]
        self.rows = self.rows[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row.

        Args:
            tokens: `(S,)`.

        Returns:
            Logits `(S, V)`.
        """
        decoder, turns = self.decoder, self.shape.turned
        if self.length == self.keys[0].shape[2]:
            self._grow()
        hidden = embedding(tokens, decoder.embedding.weight).float()  # (S, D)
        cosines, sines = (
            each[:, 0, : self.shape.size // 2].unsqueeze(1).float()  # (S, 1, E / 2)
            for each in decoder.rotary(hidden, self.positions.unsqueeze(1))
        )
        self.recording.begin(self.rows)
        parts = zip(decoder.layers, self.layers, self.keys, self.values, strict=True)
        for place, (layer, own, keys, values) in enumerate(parts):
            scale, inputs = self._normed(hidden, layer.input_norm)
            products = own.heads(inputs).to(self.stored)
            heads = products.unflatten(1, (-1, self.shape.size))  # (S, H + 2 K, E)
            turned = rotate(self._head_norms(heads[:, :turns], layer), cosines, sines)
            keys[:, :, self.length] = turned[:, self.shape.heads :]
            values[:, :, self.length] = heads[:, turns:]
            mixed = self._attend(turned[:, : self.shape.heads], keys, values).to(self.dtype)
            attended = own.out(mixed).to(self.stored)
            total = hidden + attended
            more_scale, inputs = self._normed(total, layer.mlp_norm)
            gates = own.gates(inputs).to(self.stored)  # (S, 2 F)
            gate, up = gates.to(self.dtype).chunk(2, dim=1)
            hidden = total.add_(own.down(silu(gate).mul_(up)))  # (S, D)
            self.recording.add(place, (scale, products, attended, more_scale, gates, hidden))
        self.length += 1
        self.positions = self.positions + 1
        return self.head(self._normed(hidden, decoder.norm)[1])

    def finish(self, completions: Tokens) -> None:
        """Store what the steps have computed with the prompts, for a training pass over both.

        Args:
            completions: `(B · n, T)` what was sampled, padded on the right.
        """
        # What is stored needs the memory.
        self.layers, self.keys, self.values = [], [], []
        del self.head, self.wide, self.unseen, self.logits
        store_steps(self.recording, self.prompts, self.samples, completions)

    def _normed(self, hidden: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        """The scale of a norm `(S, 1)`, and what comes out in the dtype of the products."""
        scale = rms(hidden, norm.variance_epsilon)
        return scale, normed(hidden, scale, norm.weight, self.dtype)

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
        buffers = (self.wide[:size], self.wide[size : 2 * size])
        pairs = zip(buffers, parts, strict=True)
        return [buffer.view(part.shape).copy_(part) for buffer, part in pairs]

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


def _places(prompts: list[ReadPrompts], samples: int) -> list[slice]:
    """The rows of each part of the prompts."""
    places, start = [], 0
    for part in prompts:
        end = start + samples * len(part.rows.owner)
        places.append(slice(start, end))
        start = end
    return places


def _wide(count: int) -> Tensor:
    """Memory for float32, whatever the default dtype is (Lightning's bf16-true changes it)."""
    return torch.empty(count, dtype=torch.float32)
