"""A whole decoder over tokens without padding: from ids to the states that predict completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from sdft_lightning.forward.fused.blocks import attention_block, mlp_block
from sdft_lightning.forward.fused.common import pass_over
from sdft_lightning.forward.fused.kept import ReadPrompts
from sdft_lightning.forward.fused.rows import FlatRows, prompt_rows, with_completions
from sdft_lightning.forward.fused.structure import Decoder
from sdft_lightning.forward.layout import SplitPrompts
from sdft_lightning.models.products import product_dtype
from sdft_lightning.types import Tokens


def completion_states(
    decoder: Decoder,
    split: SplitPrompts,
    completions: Tokens,
    keep: Tensor,
    dtype: torch.dtype,
    rounded: Decoder | None = None,
    read: Sequence[ReadPrompts] = (),
) -> Tensor:
    """Hidden states that predict the kept completion tokens, see `hidden`.

    Args:
        decoder: Of the model, see `decoder_of`.
        split: The prompts, less what all begin with.
        completions: `(B · n, T)`, padded on the right: n of each prompt.
        keep: `(B · n, T)` tokens of which the state is wanted.
        dtype: Of the matrix products, see `products`.
        rounded: The same model in that dtype, where there is one; weights are cast without it.
        read: What the same weights have computed of prompts, and perhaps of completions. The first
            that is of these tokens is used up here; without any all is computed now.

    Returns:
        `(N, D)` in float32, row by row.
    """
    known = next((each for each in read if each.fits(split, completions, dtype)), None)
    prompts = prompt_rows(split, decoder.heads) if known is None else known.rows
    rows = with_completions(prompts, completions, decoder.heads)
    wanted = rows.predicting[keep]  # (N,)
    # A copy in bfloat16 spares nothing where products are float32.
    own = decoder if rounded is None or product_dtype(dtype) != dtype else rounded
    if known is None and not torch.is_grad_enabled():
        dtype = product_dtype(dtype)  # nothing is kept
    states: Tensor = decoder.norm(_layers(decoder, own, rows, wanted, dtype, known))  # (N, D)
    return states


def _layers(
    decoder: Decoder,
    rounded: Decoder,
    rows: FlatRows,
    wanted: Tensor,
    dtype: torch.dtype,
    known: ReadPrompts | None,
) -> Tensor:
    """What comes out of the last layer at the wanted tokens `(N, D)`, before the norm."""
    table = decoder.embedding  # its padding token learns nothing as an input, here as there
    hidden = embedding(rows.ids, table.weight, table.padding_idx).float()  # (N, D)
    run = pass_over(decoder, rows.groups, rows.positions, hidden, dtype)
    for place, (layer, own) in enumerate(zip(decoder.layers, rounded.layers, strict=True)):
        halves = (None, None) if known is None else known.layer(place)
        attended = attention_block(hidden, layer, own, run, halves[0])
        if layer is decoder.layers[-1]:  # nothing looks at the other tokens any more
            # Not by brackets: tokens may come several times, and gradients are added in order.
            hidden, attended = hidden.index_select(0, wanted), attended.index_select(0, wanted)
        hidden = mlp_block(hidden, attended, layer, own, run, halves[1])
    return hidden
