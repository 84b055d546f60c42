"""Linear layers with their weights laid out for few rows at a time, see `rollout.packed`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.fused.structure import Layer
from sdft_lightning.forward.fused.weights import joined
from sdft_lightning.models.precision import product_dtype


class LaidOut(NamedTuple):
    """Linear layers with the same input, their weights laid out by oneDNN as one."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(parts: list[Any], rows: int) -> LaidOut:
        """Of layers with the same input, for so many rows at a time; see `products`."""
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
