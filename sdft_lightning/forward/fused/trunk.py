"""A whole decoder over tokens without padding: from ids to the states that predict completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from sdft_lightning.forward.fused.blocks import attend_after, attention_block, mlp_block, mlp_rows
from sdft_lightning.forward.fused.common import pass_over
from sdft_lightning.forward.fused.reuse import ReadPrompts, read_prompts
from sdft_lightning.forward.fused.rows import FlatRows, prompt_rows, stored_rows, with_completions
from sdft_lightning.forward.fused.structure import Decoder
from sdft_lightning.forward.layout import SplitPrompts
from sdft_lightning.models.precision import product_dtype
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
        dtype: Of the matrix products, see `precision`.
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
        dtype = product_dtype(dtype)  # nothing is stored
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


class StoredPrompt(NamedTuple):
    """What later passes need of a prompt of L tokens.

    Attributes:
        states: Keys and values of each layer; of fused blocks `(L, K, E)` each, keys rotated.
        last: `(D,)` the state that predicts the first token of a completion.
    """

    states: list[tuple[Tensor, Tensor]]
    last: Tensor


def store_prompts(decoder: Decoder, split: SplitPrompts, dtype: torch.dtype) -> list[StoredPrompt]:
    """Read prompts whose keys and values will be used many times.

    Args:
        decoder: Of a model that does not change, see `decoder_of`.
        split: B prompts, less what all begin with.
        dtype: Of the matrix products, see `precision`.
    """
    read = read_prompts(decoder, split, product_dtype(dtype))
    found = []
    for row, prompt in enumerate(read.rows.owner):
        tokens = torch.tensor([*range(read.rows.shared), *read.rows.tokens[prompt]])  # (L,)
        layers = zip(read.keys, read.values, strict=True)
        states = [(keys[tokens], values[tokens]) for keys, values in layers]
        found.append(StoredPrompt(states, read.last[row].clone()))
    return found


@torch.no_grad()
def states_after(
    decoder: Decoder,
    prompts: Sequence[StoredPrompt],
    completions: Tokens,
    keep: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Hidden states that predict the kept tokens of completions behind stored prompts.

    Arguments as of `completion_states`, without gradient.
    """
    dtype = product_dtype(dtype)  # nothing is stored
    different = list({id(prompt): prompt for prompt in prompts}.values())
    places = {id(prompt): place for place, prompt in enumerate(different)}
    lengths = [prompt.states[0][0].shape[0] for prompt in different]
    before = stored_rows(lengths, [places[id(prompt)] for prompt in prompts])
    rows, count = with_completions(before, completions, decoder.heads), sum(lengths)  # M
    wanted = rows.predicting[keep]  # (N,)
    begins = wanted < count  # (N,) predicted by the prompt
    owners = torch.arange(len(prompts)).repeat_interleave(len(keep) // len(prompts))  # (R,)
    of_first = owners[keep.nonzero()[begins, 0]]
    fresh = wanted[~begins] - count
    hidden = embedding(rows.ids[count:], decoder.embedding.weight).float()  # (n, D)
    run = pass_over(decoder, rows.groups, rows.positions[count:], hidden, dtype)
    with torch.autocast("cpu", enabled=False):
        for place, layer in enumerate(decoder.layers):
            keys, values = (
                torch.cat([prompt.states[place][part] for prompt in different]) for part in (0, 1)
            )  # (M, K, E)
            attended = attend_after(hidden, layer, run, keys, values)
            if layer is decoder.layers[-1]:  # nothing looks at the other tokens any more
                hidden, attended = hidden[fresh], attended[fresh]
            hidden = mlp_rows(hidden, attended, layer, layer, run)[0].out
        found = hidden.new_empty(len(wanted), hidden.shape[1])  # (N, D)
        found[~begins] = decoder.norm(hidden)
    last = torch.stack([prompt.last for prompt in prompts])  # (B, D)
    found[begins] = last[of_first]
    return found
