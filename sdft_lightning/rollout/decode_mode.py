"""What is changed about a model while it samples, and put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdft_lightning.forward.fused import Decoder, decoder_of
from sdft_lightning.models.precision import eval_mode, without_slow_autocast
from sdft_lightning.rollout.decode_attention import decode_attention
from sdft_lightning.rollout.packed import can_pack, packed_linears

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
    with eval_mode(model), _own_precision(model):
        decoder = decoder_of(model) if can_pack(model, rows, steps) else None
        if decoder is not None and model.dtype in _FUSED:
            yield decoder
            return
        with _contiguous_head(model), packed_linears(model, rows, steps), decode_attention(model):
            yield None


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
