"""Linear layers with their weights laid out for few rows at a time, on the CPU, for a while.

A decoding step multiplies a handful of rows by every weight of the model. The library behind
`nn.Linear` rearranges the weight at each call for that; oneDNN can do it once for all steps of a
rollout, with the operator that torch's own compiler uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# With more rows the plain product is as fast; with fewer steps the rearranging does not pay.
_MOST_ROWS, _FEWEST_STEPS = 64, 8


@contextmanager
def packed_linears(model: Any, rows: int, steps: int) -> Iterator[None]:
    """Let the float32 linear layers of a model on the CPU use rearranged copies of their weights.

    The copies take as much memory as the layers and are dropped at the end. Where they would not
    pay, or this build of torch has no oneDNN, nothing changes. Not for training: no gradient flows.

    Args:
        model: A causal language model of transformers, whose weights do not change meanwhile.
        rows: Rows of a decoding step.
        steps: Most decoding steps.
    """
    layers = _layers(model) if rows <= _MOST_ROWS and steps >= _FEWEST_STEPS else []
    try:
        for layer in layers:
            # On the instance, so that the class, the parameters and their names stay as they are.
            layer.forward = _packed_forward(layer, rows)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _layers(model: Any) -> list[nn.Linear]:
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return []
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    ]


def _packed_forward(layer: nn.Linear, rows: int) -> Any:
    operators = torch.ops.mkldnn
    weight = operators._reorder_linear_weight(layer.weight.detach(), rows)
    bias = None if layer.bias is None else layer.bias.detach()

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = operators._linear_pointwise(inputs, weight, bias, "none", [], "")
        return outputs

    return forward
