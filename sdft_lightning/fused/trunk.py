"""A whole decoder over tokens without padding: from ids to the states that predict completions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from sdft_lightning.fused.attention import Rooms, Shape, attend
from sdft_lightning.fused.blocks import Angles, attention_block, mlp_block, projected, rotated
from sdft_lightning.fused.rows import FlatRows, flat_rows
from sdft_lightning.fused.structure import Decoder, joined
from sdft_lightning.prefix import SplitPrompts


def completion_states(
    decoder: Decoder,
    split: SplitPrompts,
    completion_ids: Tensor,
    completion_mask: Tensor,
    keep: Tensor,
    dtype: torch.dtype,
    rounded: Decoder | None = None,
) -> Tensor:
    """Hidden states that predict the kept completion tokens, see `hidden`.

    Args:
        decoder: Of the model, see `decoder_of`.
        split: The prompts, less what all begin with.
        completion_ids: `(B, T)`, padded on the right.
        completion_mask: `(B, T)`.
        keep: `(B, T)` tokens of which the state is wanted.
        dtype: Of the matrix products.
        rounded: The same model in that dtype, where there is one; weights are cast without it.

    Returns:
        `(N, D)` in float32, row by row.
    """
    rows = flat_rows(split, completion_ids, completion_mask, decoder.heads)
    steps = torch.arange(keep.shape[1])  # (T,)
    wanted = (rows.first.unsqueeze(1) + steps)[keep]  # (N,)
    own = decoder if rounded is None else rounded
    states: Tensor = decoder.norm(_layers(decoder, own, rows, wanted, dtype))  # (N, D)
    return states


class PromptStates(NamedTuple):
    """What the tokens of prompts leave behind.

    Attributes:
        keys: Of each layer `(N, K, E)`, rotated, float32; of all tokens one after another.
        values: Of each layer `(N, K, E)`, in the dtype of the products.
        order: `(B, L)` which of the N tokens a prompt consists of, padded on the left.
        mask: `(B, L)` where `order` holds tokens.
        last: `(B, D)` states of the last tokens, normed.
    """

    keys: list[Tensor]
    values: list[Tensor]
    order: Tensor
    mask: Tensor
    last: Tensor


@torch.no_grad()
def prompt_states(decoder: Decoder, split: SplitPrompts, dtype: torch.dtype) -> PromptStates:
    """Read prompts, as the beginning of a rollout.

    Args:
        decoder: Of the model, see `decoder_of`.
        split: The prompts, less what all begin with.
        dtype: Of the matrix products.
    """
    nothing = split.rest_ids[:, :0]
    rows = flat_rows(split, nothing, nothing.bool(), decoder.heads)
    shape = Shape(decoder.heads, decoder.key_heads, decoder.head_size)
    hidden = embedding(rows.ids, decoder.embedding.weight).float()  # (N, D)
    angles, rooms = _angles(decoder.rotary, hidden, rows.positions), Rooms()
    keys, values = [], []
    for layer in decoder.layers:
        products = projected(hidden, layer, layer, dtype)[2]
        turned, seen = rotated(products, layer, angles, shape)
        keys.append(turned[:, shape.heads :].clone())
        values.append(seen.clone())
        mixed = attend(turned, seen, rows.groups, shape, rooms).flatten(1)  # (N, H · E)
        attended = linear(mixed, *joined([layer.o], dtype))  # (N, D)
        hidden = mlp_block(hidden, attended, layer, layer, dtype)
    order, mask = _order(split, rows.first)
    last = hidden[rows.first]  # (B, D)
    return PromptStates(keys, values, order, mask, decoder.norm(last))


def _order(split: SplitPrompts, last: Tensor) -> tuple[Tensor, Tensor]:
    """Where each prompt's tokens are `(B, L)`, given its last; and which of them are none."""
    shared = split.prefix_ids.numel()
    lengths = split.rest_mask.sum(dim=1, keepdim=True)  # (B, 1)
    width = shared + int(lengths.max())
    back = torch.arange(width - 1, -1, -1)  # (L,) places before the last token
    own = last.unsqueeze(1) - back  # (B, L)
    prefix = shared + lengths - 1 - back  # (B, L)
    order = torch.where(back < lengths, own, prefix)
    return order.clamp(min=0), prefix >= 0


def _layers(
    decoder: Decoder, rounded: Decoder, rows: FlatRows, wanted: Tensor, dtype: torch.dtype
) -> Tensor:
    """What comes out of the last layer at the wanted tokens `(N, D)`, before the norm."""
    shape = Shape(decoder.heads, decoder.key_heads, decoder.head_size)
    table = decoder.embedding  # its padding token learns nothing as an input, here as there
    hidden = embedding(rows.ids, table.weight, table.padding_idx)  # (N, D)
    angles = _angles(decoder.rotary, hidden, rows.positions)
    rooms = Rooms()
    for layer, own in zip(decoder.layers, rounded.layers, strict=True):
        attended = attention_block(hidden, layer, own, angles, rows.groups, shape, rooms, dtype)
        if layer is decoder.layers[-1]:  # nothing looks at the other tokens any more
            hidden, attended = hidden[wanted], attended[wanted]
        hidden = mlp_block(hidden, attended, layer, own, dtype)
    return hidden


@torch.no_grad()
def _angles(rotary: Any, hidden: Tensor, positions: Tensor) -> Angles:
    """Both halves of a head are rotated alike, so half of what transformers returns is enough."""
    cosines, sines = (
        each[0].unsqueeze(1).chunk(2, dim=-1)[0].float()  # (N, 1, E / 2)
        for each in rotary(hidden, positions.unsqueeze(0))
    )
    return Angles(cosines, sines)
