"""Weights of linear layers with the same input, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sdft_lightning.forward.fused.structure import decoder_of


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
