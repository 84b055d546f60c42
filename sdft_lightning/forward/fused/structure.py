"""Which models are computed in fused blocks, and where their weights are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from sdft_lightning.forward.prefix import takes_own_mask
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
    """The parts of a model that the blocks know in full, or None for any other.

    None also with rotary positions that change with the length of a call, with adapters, 4-bit
    layers, shards, activation checkpointing, attention dropout, and where somebody has hooked or
    replaced a module, since nothing of theirs would be called.

    Args:
        model: A causal language model of transformers.
    """
    base = model.base_model
    if type(base).__name__ not in _KINDS or not type(base).__module__.startswith("transformers."):
        return None
    config = base.config
    if getattr(base.rotary_emb, "rope_type", "default") in _CHANGING_ANGLES:
        return None
    if config.hidden_act != "silu" or (model.training and config.attention_dropout):
        return None
    if is_sharded(model) or not takes_own_mask(model) or _is_changed(base, model.training):
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


def training_dtype(model: Any) -> torch.dtype | None:
    """The dtype of matrix products in fused blocks, or None where they do not take a model.

    float32 weights on the CPU are multiplied as they are, or rounded under bfloat16 autocast.
    bfloat16 weights are taken where transformers would multiply them slowly, see `products`.

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
    first = next(base.parameters())
    return first.device.type != "cpu" or any(
        parameter.dtype != first.dtype for parameter in base.parameters()
    )


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
