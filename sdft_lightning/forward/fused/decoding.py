"""Decoding one token a row in few operations, with buffers for keys and values made beforehand.

`DecodingSteps` is for CPUs. Weights are rearranged once a rollout for few rows; queries, keys and
values are one product, and so are gate and up. Norms, residual sums and attention are computed in
float32, as in training, so that what a step finds can be what training begins with (see `reuse`).
Of a bfloat16 cache one layer at a time is cast, into the same memory.

`BufferedSteps` is for GPUs, where launching operations takes longer than reading the weights: it
keeps the model's own operations and dtypes, and lets a CUDA graph launch them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad, scaled_dot_product_attention, silu

from sdft_lightning.forward.forward_paths import attends_to_all
from sdft_lightning.forward.fused.attention import Shape, rotate
from sdft_lightning.forward.fused.common import normed, rms
from sdft_lightning.forward.fused.reuse import ReadPrompts, Recording, recorded_rows, store_steps
from sdft_lightning.forward.fused.structure import (
    Decoder,
    LaidOut,
    LaidOutLayer,
    Layer,
    parts_of,
)
from sdft_lightning.forward.kv_cache import Decoding, FilledCache
from sdft_lightning.models.precision import product_dtype
from sdft_lightning.models.sharding import is_sharded
from sdft_lightning.types import Tokens

log = logging.getLogger(__name__)

# Tokens that buffers grow by: most completions end long before the longest allowed.
_MORE = 64
# On a GPU: with each growth a graph is recorded anew, and all columns are read at each step.
_MORE_COLUMNS = 256
_ALIGNED = 8  # columns; attention kernels read rows of a mask from multiples of 16 bytes
_BUFFERED_ON = ("cuda",)  # types of devices
# Steps of one shape before a graph of it is recorded, which takes as long as several.
_EAGER_STEPS = 4

DecodingKind = Literal["graphs", "eager", "transformers"]
_KIND = "_sdft_decoding"


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


def choose_decoding_(model: Any, kind: DecodingKind) -> None:
    """Let rollouts of a model, and of its copies, append tokens in this way on a GPU.

    Args:
        model: A causal language model of transformers.
        kind: graphs: `BufferedSteps`, replayed as CUDA graphs; eager: the same without graphs;
            transformers: the model's own calls.
    """
    model.__dict__[_KIND] = kind


def decoding_kind(model: Any) -> DecodingKind:
    """How tokens are appended on a GPU, see `choose_decoding_`."""
    kind: DecodingKind = model.__dict__.get(_KIND, "graphs")
    return kind


def buffered_parts(model: Any) -> Decoder | None:
    """The parts of a model whose tokens `BufferedSteps` can append; None for any other.

    Those on a GPU, of a kind that fused blocks know in full, without windows, and with weights of
    one dtype that autocast leaves alone.

    Args:
        model: A causal language model of transformers, in eval mode.
    """
    device = model.device.type
    if device not in _BUFFERED_ON or decoding_kind(model) == "transformers":
        return None
    if torch.is_autocast_enabled(device) or is_sharded(model) or not attends_to_all(model):
        return None
    return parts_of(model)


class BufferedSteps(Decoding):
    """Appends tokens to buffers of keys and values, by a model's own modules.

    Queries that share a key stand below each other in one product, so that keys are never repeated.
    Shapes stay the same from step to step while no row is dropped and the buffers suffice, so that
    a CUDA graph can replay what a step launches.

    Args:
        decoder: Of the model, see `buffered_parts`.
        head: The model's output layer.
        read: The prompts; their keys and values are dropped.
        samples: Completions of each prompt (n).
        steps: Most tokens that will be appended.
        graphs: Record a CUDA graph of a step, once its shape has lasted some steps.

    Attributes:
        logits: `(B · n, V)` of what follows the prompts.
    """

    def __init__(
        self,
        decoder: Decoder,
        head: Any,
        read: FilledCache,
        samples: int,
        steps: int,
        graphs: bool,
    ) -> None:
        self.decoder, self.head, self.graphs = decoder, head, graphs
        self.shape = Shape(decoder.heads, decoder.key_heads, decoder.head_size)
        mask = read.mask.repeat_interleave(samples, dim=0)  # (S, L)
        self.length = mask.shape[1]
        self.longest = self.length + steps
        more = self._more(self.length)
        self.keys: list[Tensor] = []  # of each layer (S, K, M, E)
        self.values: list[Tensor] = []
        for layer in read.cache.layers:
            for buffers, found in zip((self.keys, self.values), read.take(layer), strict=True):
                # Zeros: what is not written yet has no weight, but 0 · NaN would be one.
                buffer = pad(found, (0, 0, 0, more))
                buffers.append(buffer.repeat_interleave(samples, dim=0) if samples > 1 else buffer)
        unseen = torch.zeros_like(mask, dtype=self.keys[0].dtype)  # (S, L)
        unseen.masked_fill_(~mask, float("-inf"))
        unseen = pad(unseen, (0, more), value=float("-inf"))
        self.unseen = unseen[:, None, None]  # (S, 1, 1, M) added to the scores
        self.positions = mask.sum(dim=1, keepdim=True)  # (S, 1) of the next token
        self.tokens = self.positions.new_zeros(len(mask))  # (S,)
        self.column = self.positions.new_zeros(1)  # where the next key is written
        self.logits = read.logits.repeat_interleave(samples, dim=0)
        self._replay: Callable[[], Tensor] | None = None
        self._of_this_shape = 0  # steps

    def keep(self, rows: Tensor) -> None:
        """Keep some rows only.

        Args:
            rows: `(n,)` ascending.
        """
        self._forget_graph()
        for buffers in (self.keys, self.values):
            for place, buffer in enumerate(buffers):
                buffers[place] = buffer[rows]
        self.unseen, self.positions = self.unseen[rows], self.positions[rows]
        self.tokens = self.tokens[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row.

        Args:
            tokens: `(S,)`.

        Returns:
            Logits `(S, V)`, which the next step may write over.
        """
        if self.length == self.unseen.shape[-1]:
            self._grow()
        self.tokens.copy_(tokens)
        self.column.fill_(self.length)
        self.unseen[..., self.length] = 0
        self._of_this_shape += 1
        if self.graphs and self._of_this_shape > _EAGER_STEPS and self._replay is None:
            self._record()
        logits = self._compute() if self._replay is None else self._replay()
        self.length += 1
        self.positions += 1
        return logits

    def _compute(self) -> Tensor:
        """Logits `(S, V)` that follow `self.tokens`, whose keys and values are written."""
        decoder, shape = self.decoder, self.shape
        hidden = decoder.embedding(self.tokens)  # (S, D)
        cosines, sines = decoder.rotary(hidden, self.positions)  # (S, 1, E) each
        parts = zip(decoder.layers, self.keys, self.values, strict=True)
        for layer, keys, values in parts:
            inputs = layer.input_norm(hidden)
            queries, new_keys, new_values = (
                product(inputs).unflatten(1, (-1, shape.size)) for product in layer[1:4]
            )  # (S, H, E), (S, K, E), (S, K, E)
            if layer.q_norm is not None:
                queries, new_keys = layer.q_norm(queries), layer.k_norm(new_keys)
            queries = _turned(queries, cosines, sines)
            new_keys = _turned(new_keys, cosines, sines)
            keys.index_copy_(2, self.column, new_keys.unsqueeze(2))
            values.index_copy_(2, self.column, new_values.unsqueeze(2))
            mixed = scaled_dot_product_attention(
                queries.unflatten(1, (shape.key_heads, -1)),  # (S, K, H / K, E)
                keys,
                values,
                attn_mask=self.unseen,
                scale=shape.size**-0.5,
            )  # (S, K, H / K, E)
            hidden = hidden + layer.o(mixed.flatten(1))
            inputs = layer.mlp_norm(hidden)
            hidden = hidden + layer.down(silu(layer.gate(inputs)) * layer.up(inputs))
        logits: Tensor = self.head(decoder.norm(hidden))
        return logits

    def _record(self) -> None:
        """Record a graph of a step; where that fails, steps stay as they are."""
        try:
            self._replay = _recorded(self._compute)
        except RuntimeError as error:
            self.graphs = False
            log.warning(
                f"rollout: no CUDA graph of a decoding step could be recorded ({error}); steps are "
                "launched one by one. --model.policy.decoding=eager does not try."
            )

    def _forget_graph(self) -> None:
        """Drop a graph, whose shapes or buffers are about to be others."""
        self._replay, self._of_this_shape = None, 0

    def _grow(self) -> None:
        """Enlarge the buffers, layer by layer."""
        self._forget_graph()
        more = self._more(self.length)
        for buffers in (self.keys, self.values):
            for place, buffer in enumerate(buffers):
                buffers[place] = pad(buffer, (0, 0, 0, more))
        self.unseen = pad(self.unseen, (0, more), value=float("-inf"))

    def _more(self, length: int) -> int:
        """Columns to add behind so many: to a multiple that kernels like, and not far too many."""
        wanted = min(self.longest, length + _MORE_COLUMNS)
        return -(-wanted // _ALIGNED) * _ALIGNED - length


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Heads `(S, H, E)` turned to their positions, in the model's dtype, as in transformers."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat([-right, left], dim=-1) * sines


def _recorded(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that launches again, as one graph, what another one launches.

    Args:
        compute: Works on the same memory each time.

    Returns:
        A function that returns the same tensor each time, written anew.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = compute()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
