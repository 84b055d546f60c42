"""What is changed about a model while it samples, and put back afterwards.

A decoding step multiplies a handful of rows by every weight of the model. The library behind
`nn.Linear` rearranges the weight at each call for that; oneDNN can do it once for all steps of a
rollout, with the operator that torch's own compiler uses. Of a layer with adapters it is
W + s · B A that is laid out, so that adapters cost a rollout no products of their own.

Attention of one new token a row is computed by the plain formula: on CPUs torch's flash kernel
takes eight times as long in bfloat16 for a single query (16 rows, 9 heads, 100 keys: 0.86 ms
against 0.11 ms a layer).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdft_lightning.forward.fused import Decoder, decoder_of
from sdft_lightning.models.lora import adapter_layers, merged_weight
from sdft_lightning.models.precision import eval_mode, product_dtype, without_slow_autocast

_FUSED = (torch.float32, torch.bfloat16)


@contextmanager
def decode_mode(model: Any, rows: int, steps: int) -> Iterator[Decoder | None]:
    """Eval mode, the weights' own precision, and layers that are ready for few rows.

    Args:
        model: A causal language model of transformers, whose weights do not change meanwhile.
        rows: Rows of a decoding step.
        steps: Most decoding steps.

    Yields:
        The model's parts where its steps are to be fused, and nothing of it was changed.
    """
    with _dropping_casts(), eval_mode(model), _own_precision(model):
        decoder = decoder_of(model) if can_pack(model, rows, steps) else None
        if decoder is not None and model.dtype in _FUSED:
            yield decoder
            return
        with _contiguous_head(model), packed_linears(model, rows, steps), decode_attention(model):
            yield None


@contextmanager
def _dropping_casts() -> Iterator[None]:
    """Empty autocast's cache at the end.

    Weights that were cast while no gradients were wanted are stored there, by older releases of
    torch (2.13 is not one) without a graph. A training pass in the same autocast context would use
    them, and the weights would get no gradient. Lightning 2.6 turns the cache off.
    """
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _own_precision(model: Any) -> Iterator[None]:
    """Without autocast where all weights are in bfloat16, or where it would be slow.

    There is nothing left to cast: autocast would still be asked about every operation, and weights
    would not be laid out anew.
    """
    parameters = list(model.parameters())
    if any(parameter.dtype != torch.bfloat16 for parameter in parameters):
        with without_slow_autocast(model):
            yield
        return
    with torch.autocast(parameters[0].device.type, enabled=False):
        yield


@contextmanager
def _contiguous_head(model: Any) -> Iterator[None]:
    """Give the output head its inputs in one piece.

    Models slice the last position out of all; of such an input torch makes a batched product, for
    which it copies the whole head once a row.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(_in_one_piece)
    try:
        yield
    finally:
        handle.remove()


def _in_one_piece(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.contiguous() if isinstance(part, Tensor) else part for part in inputs)


_NAME = "sdpa"
# Options of transformers' attention functions that change what comes out.
_CHANGES = ("position_bias", "softcap", "s_aux", "head_mask")


@contextmanager
def decode_attention(model: Any) -> Iterator[None]:
    """Let a model that attends with `sdpa` compute single queries by the plain formula.

    It computes in float32, as the kernel does within itself. Elsewhere nothing is changed: on other
    devices, in float32, and for prompts.

    Args:
        model: A causal language model of transformers.
    """
    attends_with = getattr(model.config, "_attn_implementation", None)
    if attends_with != _NAME or model.device.type != "cpu" or model.dtype != torch.bfloat16:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kernel = ALL_ATTENTION_FUNCTIONS[_NAME]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        if _is_plain(query, key, mask, options):
            return single_query(query, key, value, mask, options.get("scaling")), None
        found: tuple[Tensor, None] = kernel(module, query, key, value, mask, **options)
        return found

    ALL_ATTENTION_FUNCTIONS[_NAME] = attend  # of this instance only, see GeneralInterface
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[_NAME] = kernel


def _is_plain(query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether there is one query a row, and nothing that the formula does not know."""
    return (
        query.shape[2] == 1
        and query.dtype == torch.bfloat16
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (mask.dim() == 4 and mask.shape[1] == 1))
        and not options.get("dropout")
        and not any(options.get(name) is not None for name in _CHANGES)
        and not options.get("output_attentions")
    )


def single_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None
) -> Tensor:
    """Attention of one query a row.

    Args:
        query: `(B, H, 1, D)`.
        key: `(B, K, L, D)`; H / K query heads share a key.
        value: `(B, K, L, E)`.
        mask: `(B, 1, 1, L)` or `(1, 1, 1, L)`, True where a key is seen, or what is added to the
            scores; longer masks are cut.
        scaling: The scores are multiplied by it; 1 / √D without it.

    Returns:
        `(B, 1, H, E)` in the query's dtype.
    """
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, width).float()  # (B, K, H / K, D)
    scores = grouped @ key.float().transpose(-1, -2)  # (B, K, H / K, L)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask
    mixed = scores.softmax(dim=-1) @ value.float()  # (B, K, H / K, E)
    return mixed.reshape(rows, 1, heads, -1).to(query.dtype)


# With more rows the plain product is as fast; with fewer steps the rearranging does not pay.
_MOST_ROWS, _FEWEST_STEPS = 64, 8


@contextmanager
def packed_linears(model: Any, rows: int, steps: int) -> Iterator[None]:
    """Let the linear layers of a model on the CPU use rearranged copies of their weights.

    The copies take as much memory as the layers, or twice as much where bfloat16 is multiplied in
    float32 (`precision`), and are dropped at the end. Where they would not pay, or this build of
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
    if first.device.type != "cpu" or not packing_pays(first.dtype, rows, steps):
        return False
    # Autocast would have cast the weights that are laid out.
    return not torch.is_autocast_enabled("cpu")


def packing_pays(dtype: torch.dtype, rows: int, steps: int) -> bool:
    """Whether weights on a CPU are laid out for so many rows and steps.

    Args:
        dtype: Of the weights.
        rows: Rows of a decoding step.
        steps: Most decoding steps.
    """
    # Where the plain product is slow at any size, laying out always pays.
    if product_dtype(dtype) == dtype and (rows > _MOST_ROWS or steps < _FEWEST_STEPS):
        return False
    return bool(torch.backends.mkldnn.is_available())


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
