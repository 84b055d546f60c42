"""A whole decoder over tokens without padding: from ids to the states that predict completions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from sdft_lightning.forward.fused.attention_block import attention_block
from sdft_lightning.forward.fused.mlp_block import mlp_block
from sdft_lightning.forward.fused.passes import pass_over
from sdft_lightning.forward.fused.prompts import ReadPrompts
from sdft_lightning.forward.fused.rows import FlatRows, prompt_rows, with_completions
from sdft_lightning.forward.fused.structure import Decoder
from sdft_lightning.forward.prefix import SplitPrompts
from sdft_lightning.models.precision import product_dtype


def completion_states(
    decoder: Decoder,
    split: SplitPrompts,
    completion_ids: Tensor,
    completion_mask: Tensor,
    keep: Tensor,
    dtype: torch.dtype,
    rounded: Decoder | None = None,
    read: ReadPrompts | None = None,
) -> Tensor:
    """Hidden states that predict the kept completion tokens, see `hidden`.

    Args:
        decoder: Of the model, see `decoder_of`.
        split: The prompts, less what all begin with.
        completion_ids: `(B, T)`, padded on the right.
        completion_mask: `(B, T)`.
        keep: `(B, T)` tokens of which the state is wanted.
        dtype: Of the matrix products, see `products`.
        rounded: The same model in that dtype, where there is one; weights are cast without it.
        read: What the same weights have computed of the prompts, and perhaps of these completions,
            used up here. Without it all is computed now, each prompt once however many completions
            it has.

    Returns:
        `(N, D)` in float32, row by row.
    """
    if read is not None and not read.fits(split, completion_ids, completion_mask, dtype):
        read = None  # somebody has changed what was sampled, or what it answers
    prompts = prompt_rows(split, decoder.heads) if read is None else read.rows
    rows = with_completions(prompts, completion_ids, completion_mask, decoder.heads)
    wanted = rows.predicting[keep]  # (N,)
    # A copy in bfloat16 spares nothing where products are float32.
    own = decoder if rounded is None or product_dtype(dtype) != dtype else rounded
    if read is None and not torch.is_grad_enabled():
        dtype = product_dtype(dtype)  # nothing is kept
    states: Tensor = decoder.norm(_layers(decoder, own, rows, wanted, dtype, read))  # (N, D)
    return states


def _layers(
    decoder: Decoder,
    rounded: Decoder,
    rows: FlatRows,
    wanted: Tensor,
    dtype: torch.dtype,
    read: ReadPrompts | None,
) -> Tensor:
    """What comes out of the last layer at the wanted tokens `(N, D)`, before the norm."""
    table = decoder.embedding  # its padding token learns nothing as an input, here as there
    hidden = embedding(rows.ids, table.weight, table.padding_idx).float()  # (N, D)
    run = pass_over(decoder, rows.groups, rows.positions, hidden, dtype)
    for place, (layer, own) in enumerate(zip(decoder.layers, rounded.layers, strict=True)):
        known = (None, None) if read is None else read.layer(place)
        attended = attention_block(hidden, layer, own, run, known[0])
        if layer is decoder.layers[-1]:  # nothing looks at the other tokens any more
            # Not by brackets: tokens may come several times, and gradients are added in order.
            hidden, attended = hidden.index_select(0, wanted), attended.index_select(0, wanted)
        hidden = mlp_block(hidden, attended, layer, own, run, known[1])
    return hidden
