"""Models beside an adapted one that hold no second copy of its frozen weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sdft_lightning.lora.adapters import ADAPTER, adapter_layers, adapter_parameters


def sharing_copy(model: Any) -> Any:
    """A copy with adapters of its own, on the very same frozen parameters.

    Args:
        model: An adapted model.

    Returns:
        A model with modules, modes and hooks of its own; names as in the original.
    """
    own = {id(parameter) for parameter in adapter_parameters(model).values()}
    shared: list[Any] = [p for p in model.parameters() if id(p) not in own]
    # What bitsandbytes needs to read a quantized layer belongs to the layer's weight.
    states = (getattr(part, "quant_state", None) for part in model.modules())
    shared += [state for state in states if state is not None]
    return copy.deepcopy(model, {id(each): each for each in shared})


def base_copy(model: Any) -> Any:
    """The model with its adapters off: without them, on the same frozen parameters.

    Args:
        model: An adapted model.
    """
    base = sharing_copy(model)
    for name, layer in adapter_layers(base).items():
        _replace_(base, name, layer.get_base_layer())
    del base.peft_config
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
        weight = base.weight.float() + layer.get_delta_weight(ADAPTER).float()
        # A parameter of its own: the present one is the student's.
        base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
        _replace_(merged, name, base)
    del merged.peft_config
    return merged


@torch.no_grad()
def adapter_distance(teacher: Any, student: Any) -> float:
    """‖teacher − student‖ / ‖student‖ over all weights W + s · B A, 0 for the same ones.

    Args:
        teacher: A copy made here, with adapters or without.
        student: The adapted model.
    """
    from peft.utils.integrations import dequantize_module_weight

    apart = torch.zeros((), dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    theirs = adapter_layers(teacher)
    adapted = set()
    for name, layer in adapter_layers(student).items():
        delta = layer.get_delta_weight(ADAPTER).float()
        other = theirs[name].get_delta_weight(ADAPTER).float() if name in theirs else 0.0
        base = layer.get_base_layer()
        apart += (other - delta).square().sum().double().cpu()
        size += (dequantize_module_weight(base).float() + delta).square().sum().double().cpu()
        adapted.add(id(base.weight))
    adapted |= {id(parameter) for parameter in adapter_parameters(student).values()}
    for parameter in student.parameters():
        if id(parameter) not in adapted:
            size += parameter.float().square().sum().double().cpu()
    return float((apart / size).sqrt())


def _replace_(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)
