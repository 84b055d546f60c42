"""Which models are computed in fused blocks, where their weights are, and products with these.

Linear layers with the same input are one product. For decoding their weights are laid out for few
rows at a time, see `rollout.decode_mode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sdft_lightning.forward.layout import takes_own_mask
from sdft_lightning.models.precision import product_dtype
from sdft_lightning.models.sharding import is_sharded

# Of transformers; all with RMS norms before each half, rotary positions and a gated MLP.
_KINDS = ("LlamaModel", "Qwen2Model", "Qwen3Model")
# Rotary positions that depend on the longest sequence of a call.
_CHANGING_ANGLES = ("dynamic", "longrope")
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Layer(NamedTuple):
    """The modules of one decoder layer; the norms of queries and keys where there are any."""

    input_norm: Any
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    q_norm: Any
    k_norm: Any
    mlp_norm: Any
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear


class Decoder(NamedTuple):
    """What the blocks need of a model.

    Attributes:
        embedding: Token embeddings.
        layers: All layers, in order.
        norm: The last norm.
        rotary: Called with a tensor and positions `(1, N)`; returns cosines and sines.
        heads: H query heads.
        key_heads: K heads of keys and values; H / K query heads share one.
        head_size: E, the size of a head.
    """

    embedding: nn.Embedding
    layers: list[Layer]
    norm: Any
    rotary: Any
    heads: int
    key_heads: int
    head_size: int


def decoder_of(model: Any) -> Decoder | None:
    """The parts of a model on the CPU that the blocks know in full, or None for any other.

    None also with rotary positions that change with the length of a call, with adapters, 4-bit
    layers, shards, activation checkpointing, attention dropout, and where somebody has hooked or
    replaced a module, since nothing of theirs would be called.

    Args:
        model: A causal language model of transformers.
    """
    if model.device.type != "cpu" or not is_known_kind(model.base_model):
        return None
    return parts_of(model) if not is_sharded(model) and takes_own_mask(model) else None


def parts_of(model: Any) -> Decoder | None:
    """The parts of a model of a known kind in which nothing was changed, on any device.

    Args:
        model: A causal language model of transformers, not spread over processes.

    Returns:
        None for any other.
    """
    base = model.base_model
    if not is_known_kind(base) or _is_changed(base, model.training):
        return None
    config = base.config
    if model.training and config.attention_dropout:
        return None
    layers = [_layer(each) for each in base.layers]
    size = layers[0].q.out_features // config.num_attention_heads
    return Decoder(
        base.embed_tokens,
        layers,
        base.norm,
        base.rotary_emb,
        config.num_attention_heads,
        config.num_key_value_heads,
        size,
    )


def is_known_kind(base: Any) -> bool:
    """Whether the blocks know an architecture; see `decoder_of` for what else they ask.

    Args:
        base: A base model of transformers, with weights or on the meta device.
    """
    if type(base).__name__ not in _KINDS or not type(base).__module__.startswith("transformers."):
        return False
    changing = getattr(base.rotary_emb, "rope_type", "default") in _CHANGING_ANGLES
    return not changing and base.config.hidden_act == "silu"


def training_dtype(model: Any) -> torch.dtype | None:
    """The dtype of matrix products in fused blocks, or None where they do not take a model.

    float32 weights on the CPU are multiplied as they are, or rounded under bfloat16 autocast.
    bfloat16 weights are taken where transformers would multiply them slowly, see `precision`.

    Args:
        model: A causal language model of transformers.
    """
    if model.device.type != "cpu":
        return None
    if model.dtype == torch.bfloat16 and product_dtype(torch.bfloat16) != torch.bfloat16:
        return torch.bfloat16
    if model.dtype != torch.float32:
        return None
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32
    dtype = torch.get_autocast_dtype("cpu")
    return dtype if dtype == torch.bfloat16 else None


def _is_changed(base: nn.Module, training: bool) -> bool:
    """Whether a module is not what transformers made, or would do more than the blocks do."""
    for name, module in base.named_modules():
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            return True
        if module._backward_hooks or module._backward_pre_hooks:
            return True
        if training and getattr(module, "gradient_checkpointing", False):
            return True
        last = name.rpartition(".")[2]
        if last in _LINEAR and type(module) is not nn.Linear:
            return True
    return len({parameter.dtype for parameter in base.parameters()}) > 1


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        input_norm=layer.input_layernorm,
        q=attention.q_proj,
        k=attention.k_proj,
        v=attention.v_proj,
        o=attention.o_proj,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        mlp_norm=layer.post_attention_layernorm,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )


class Product(NamedTuple):
    """Linear layers with the same input.

    Attributes:
        weights: `(O_i, D)` each, in one dtype: that of the inputs, or bfloat16, which is widened
            layer by layer since copies of all would be twice as large as the model.
        bias: `(ΣO,)`, where they have any.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None

    @staticmethod
    def of(parts: list[nn.Linear], dtype: torch.dtype) -> Product:
        """The layers themselves where nothing has to be rounded, else one copy of all.

        Args:
            parts: Layers that all have a bias, or none of them.
            dtype: Of the product.
        """
        weights = [part.weight.detach() for part in parts]
        widens = weights[0].dtype == torch.bfloat16 and dtype == torch.float32
        if (weights[0].dtype != dtype and not widens) or _are_together(weights):
            weight, bias = joined(parts, weights[0].dtype if widens else dtype)
            return Product((weight,), None if bias is None else bias.to(dtype))
        return Product(tuple(weights), _joined_bias(parts, dtype))

    def __call__(self, inputs: Tensor) -> Tensor:
        """`(N, ΣO)` of `(N, D)`, without gradient."""
        if len(self.weights) == 1:
            return linear(inputs, self.weights[0].to(inputs.dtype), self.bias)
        sizes = [weight.shape[0] for weight in self.weights]
        outputs = inputs.new_empty(inputs.shape[0], sum(sizes))
        for weight, place in zip(self.weights, outputs.split(sizes, dim=1), strict=True):
            torch.mm(inputs, weight.to(inputs.dtype).T, out=place)
        return outputs if self.bias is None else outputs.add_(self.bias)


def product_backward(gradient: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient in the inputs `(N, D)` of a `Product`.

    Args:
        gradient: `(N, ΣO)` of its outputs.
        weights: Its weights.
    """
    pieces = gradient.split([weight.shape[0] for weight in weights], dim=1)
    found: Tensor = pieces[0] @ weights[0].to(gradient.dtype)
    for piece, weight in zip(pieces[1:], weights[1:], strict=True):
        found.addmm_(piece, weight.to(gradient.dtype))
    return found


def joined(parts: list[nn.Linear], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights of linear layers with the same input as one `(ΣO, D)`, and their biases `(ΣO,)`.

    Args:
        parts: Layers that all have a bias, or none of them.
        dtype: Of the result, which is a copy unless `join_` has put the weights together.
    """
    bias = _joined_bias(parts, dtype)
    rows = sum(part.out_features for part in parts)
    first = parts[0].weight.detach()
    if first.dtype == dtype and _are_together([part.weight for part in parts]):
        return first.as_strided((rows, first.shape[1]), first.stride()), bias
    weight = first.new_empty(rows, first.shape[1], dtype=dtype)
    torch.cat([part.weight.detach() for part in parts], out=weight)
    return weight, bias


def _joined_bias(parts: list[nn.Linear], dtype: torch.dtype) -> Tensor | None:
    if parts[0].bias is None:
        return None
    return torch.cat([part.bias.detach() for part in parts]).to(dtype)


def _are_together(weights: list[Tensor]) -> bool:
    """Whether weights lie one behind the other in the same memory."""
    place = weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != place or not weight.is_contiguous():
            return False
        place += weight.numel() * weight.element_size()
    storage = weights[0].untyped_storage()
    return place <= storage.data_ptr() + storage.nbytes()


@torch.no_grad()
def join_(model: Any) -> None:
    """Lay weights with the same input together, so that `joined` need not copy them.

    Parameters keep names and values; of a model that the blocks do not know nothing is changed.

    Args:
        model: A causal language model of transformers that is not trained.
    """
    decoder = decoder_of(model)
    for layer in [] if decoder is None else decoder.layers:
        for parts in ([layer.q, layer.k, layer.v], [layer.gate, layer.up]):
            weight = torch.cat([part.weight for part in parts])
            for part, own in zip(
                parts, weight.split([each.out_features for each in parts]), strict=True
            ):
                part.weight.data = own


class LaidOut(NamedTuple):
    """Linear layers with the same input, their weights laid out by oneDNN as one."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(parts: list[Any], rows: int) -> LaidOut:
        """Of layers with the same input, for so many rows at a time; see `precision`."""
        weight, bias = joined(parts, product_dtype(parts[0].weight.dtype))
        return LaidOut(torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        """W x + b."""
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self.weight, self.bias, "none", [], ""
        )
        return outputs


class LaidOutLayer(NamedTuple):
    """The products of a layer."""

    heads: LaidOut
    out: LaidOut
    gates: LaidOut
    down: LaidOut

    @staticmethod
    def of(layer: Layer, rows: int) -> LaidOutLayer:
        """Lay a layer out for so many rows."""
        parts = ([layer.q, layer.k, layer.v], [layer.o], [layer.gate, layer.up], [layer.down])
        return LaidOutLayer(*(LaidOut.of(list(each), rows) for each in parts))
