"""Linear layers with their weights laid out for few rows at a time, on the CPU, for a while.

A decoding step multiplies a handful of rows by every weight of the model. The library behind
`nn.Linear` rearranges the weight at each call for that; oneDNN can do it once for all steps of a
rollout, with the operator that torch's own compiler uses. Of a layer with adapters it is
W + s · B A that is laid out, so that adapters cost a rollout no products of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdft_lightning.models.lora import adapter_layers, merged_weight
from sdft_lightning.models.precision import product_dtype

# With more rows the plain product is as fast; with fewer steps the rearranging does not pay.
_MOST_ROWS, _FEWEST_STEPS = 64, 8


@contextmanager
def packed_linears(model: Any, rows: int, steps: int) -> Iterator[None]:
    """Let the linear layers of a model on the CPU use rearranged copies of their weights.

    The copies take as much memory as the layers, or twice as much where bfloat16 is multiplied in
    float32 (see `products`), and are dropped at the end. Where they would not pay, or this build of
    torch has no oneDNN, nothing changes. Not for training: no gradient flows.

    Args:
        model: A causal language model of transformers, whose weights do not change meanwhile.
        rows: Rows of a decoding step.
        steps: Most decoding steps.
    """
    layers = _layers(model) if can_pack(model, rows, steps) else []
    try:
        for layer in layers:
            # On the instance, so that the class, the parameters and their names stay as they are.
            layer.forward = _packed_forward(layer, rows)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def can_pack(model: Any, rows: int, steps: int) -> bool:
    """Whether laying weights out pays and is possible; arguments as of `packed_linears`."""
    first = next(model.parameters())
    if first.device.type != "cpu":
        return False
    # Where the plain product is slow at any size, laying out always pays.
    if product_dtype(first.dtype) == first.dtype and (rows > _MOST_ROWS or steps < _FEWEST_STEPS):
        return False
    # Autocast would have cast the weights that are laid out.
    return torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")


def _layers(model: Any) -> list[Any]:
    """What is laid out: linear layers; adapted ones whole, not the three that each holds."""
    layers = adapter_layers(model)
    inside = {part for layer in layers.values() for part in layer.modules() if part is not layer}
    adapted = [layer for layer in layers.values() if _fits(layer.get_base_layer())]
    plain = [part for part in model.modules() if _fits(part) and part not in inside]
    return [layer for layer in [*adapted, *plain] if "forward" not in layer.__dict__]


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or module.weight.device.type != "cpu":
        return False
    return module.weight.dtype in (torch.float32, torch.bfloat16)


def _packed_forward(layer: Any, rows: int) -> Any:
    operators = torch.ops.mkldnn
    weight, bias = layer.weight.detach(), layer.bias
    if type(layer) is not nn.Linear:
        weight = merged_weight(layer).to(layer.get_base_layer().weight.dtype)  # (out, in)
    dtype = product_dtype(weight.dtype)
    packed = operators._reorder_linear_weight(weight.to(dtype), rows)
    bias = None if bias is None else bias.detach().to(dtype)

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = operators._linear_pointwise(
            inputs.to(dtype), packed, bias, "none", [], ""
        )
        return outputs.to(inputs.dtype)

    return forward
