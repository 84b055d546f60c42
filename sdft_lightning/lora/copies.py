"""Models beside an adapted one that hold no second copy of its frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdft_lightning.lora.adapters import (
    ADAPTER,
    adapter_layers,
    adapter_parameters,
    is_adapted,
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
    for name, layer in adapter_layers(base).items():
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
    for name, layer in adapter_layers(merged).items():
        base = layer.get_base_layer()
        weight = merged_weight(layer)
        # A parameter of its own: the present one is the student's.
        base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
        _replace_(merged, name, base)
    del merged.peft_config
    return merged


def effective_weights(model: Any) -> dict[str, Callable[[], Tensor]]:
    """What reads each weight of a model in float32, under its name in the base model.

    Of an adapted layer that is W + s · B A; tied weights are there once. They are read one by
    one, since all of them at once would be a second model.

    Args:
        model: A model, adapted or not, quantized or not.
    """
    layers, adapters = adapter_layers(model), adapter_parameters(model)
    return {
        name.replace(".base_layer.", "."): partial(
            _effective, parameter, layers.get(name.removesuffix(".base_layer.weight"))
        )
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
    """W + s · B A of an adapted layer, `(out, in)` in float32.

    Args:
        layer: One of `adapter_layers`.
    """
    return _effective(layer.get_base_layer().weight, layer)


def _replace_(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)
