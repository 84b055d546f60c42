"""Models beside an adapted one that hold no second copy of its frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdft_lightning.models.lora.adapters import (
    ADAPTER,
    adapted_weight,
    adapter_layers,
    adapter_parameters,
    base_name,
    is_adapted,
    weight_name,
)


def sharing_copy(model: Any) -> Any:
    """A copy with adapters of its own, on the very same frozen parameters.

    Args:
        model: A model; one without adapters shares nothing with its copy.

    Returns:
        A model with modules, modes and hooks of its own; names as in the original.
    """
    if not is_adapted(model):
        return copy.deepcopy(model)
    own = {id(parameter) for parameter in adapter_parameters(model).values()}
    shared: list[Any] = [p for p in model.parameters() if id(p) not in own]
    # What bitsandbytes needs to read a quantized layer belongs to the layer's weight.
    states = (getattr(part, "quant_state", None) for part in model.modules())
    shared += [state for state in states if state is not None]
    return copy.deepcopy(model, {id(each): each for each in shared})


def base_copy(model: Any) -> Any:
    """The model with its adapters off: without them, on the same frozen parameters.

    Args:
        model: A model; one without adapters is copied as it is.
    """
    base = sharing_copy(model)
    for name, layer in _outermost(adapter_layers(base)).items():
        _replace_(base, name, layer.get_base_layer())
    base.__dict__.pop("peft_config", None)
    return base


@torch.no_grad()
def merged_copy(model: Any) -> Any:
    """A plain model with W + s · B A in each adapted layer; the rest is shared.

    Args:
        model: An adapted model whose layers are not quantized.
    """
    merged = sharing_copy(model)
    layers = adapter_layers(merged)
    for layer in layers.values():
        own = adapted_weight(layer)
        weight = merged_weight(layer).to(own.dtype)
        # A parameter of its own: the present one is the student's.
        new = nn.Parameter(weight, requires_grad=False)
        setattr(layer.get_base_layer(), weight_name(layer), new)
    for name, layer in _outermost(layers).items():
        _replace_(merged, name, layer.get_base_layer())
    del merged.peft_config
    return merged


def effective_weights(model: Any) -> dict[str, Callable[[], Tensor]]:
    """What reads each weight of a model in float32, under its name in the base model.

    Of an adapted layer that is W + s · B A; tied weights are there once. They are read one by
    one, since all of them at once would be a second model.

    Args:
        model: A model, adapted or not, quantized or not.
    """
    layers = {id(adapted_weight(layer)): layer for layer in adapter_layers(model).values()}
    adapters = adapter_parameters(model)
    return {
        base_name(name): partial(_effective, parameter, layers.get(id(parameter)))
        for name, parameter in model.named_parameters()
        if name not in adapters
    }


@torch.no_grad()
def _effective(parameter: Tensor, layer: Any) -> Tensor:
    if type(parameter).__name__ == "Params4bit":
        from peft.utils.integrations import dequantize_bnb_weight

        parameter = dequantize_bnb_weight(cast(nn.Parameter, parameter))
    weight = parameter.float()
    return weight if layer is None else weight + layer.get_delta_weight(ADAPTER).float()


def merged_weight(layer: Any) -> Tensor:
    """W + s · B A of an adapted layer, `(out, in)` in float32; `(E, out, in)` of E fused experts.

    Args:
        layer: One of `adapter_layers`.
    """
    return _effective(adapted_weight(layer), layer)


def _outermost(layers: dict[str, Any]) -> dict[str, Any]:
    """Adapted layers that stand in no other: each of the parameters of fused experts has one."""
    return {name: layer for name, layer in layers.items() if not name.endswith(".base_layer")}


def _replace_(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)
