"""Prompts read once: for the rollout that goes on from them, and for the student's pass over it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from sdft_lightning.forward.fused.attention_block import attend_rows
from sdft_lightning.forward.fused.mlp_block import mlp_rows
from sdft_lightning.forward.fused.passes import Results, pass_over
from sdft_lightning.forward.fused.rows import PromptRows, prompt_rows, token_lists
from sdft_lightning.forward.fused.structure import Decoder
from sdft_lightning.forward.prefix import SplitPrompts

# Of a layer: its attention, and its MLP where that is computed at all tokens.
LayerResults = tuple[Results, Results | None]


class ReadPrompts:
    """What reading prompts has left, and later what sampling their completions has.

    Args:
        decoder: Whose embeddings and norms were used.
        rows: The prompts, M tokens.
        keys: Of each layer `(M, K, E)`, rotated, float32.
        values: Of each layer `(M, K, E)`, in the dtype that products are kept in.
        last: `(B, D)` states of each row's last token, normed.
        layers: What a pass over prompts and completions need not compute again, layer by layer.
        kept: The dtype that products are kept in.

    Attributes:
        completions: The completions whose tokens `layers` has results of, too; None while it has
            those of the prompts only.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: PromptRows,
        keys: list[Tensor],
        values: list[Tensor],
        last: Tensor,
        layers: list[LayerResults],
        kept: torch.dtype,
    ) -> None:
        self.decoder, self.rows, self.last = decoder, rows, last
        self.keys, self.values, self.kept = keys, values, kept
        self.completions: list[list[int]] | None = None
        self._layers: dict[int, LayerResults] = dict(enumerate(layers))

    @property
    def is_kept(self) -> bool:
        """Whether there is anything for a later pass."""
        return bool(self._layers)

    def layer(self, place: int) -> LayerResults:
        """The results of a layer; each is given away once, and no longer held.

        Raises:
            KeyError: Where they were not kept, or have been taken.
        """
        return self._layers.pop(place)

    def add(self, place: int, results: LayerResults) -> None:
        """Keep results of a layer, in place of those that were taken."""
        self._layers[place] = results

    def fits(
        self,
        split: SplitPrompts,
        completion_ids: Tensor,
        completion_mask: Tensor,
        dtype: torch.dtype,
    ) -> bool:
        """Whether something is kept, in this dtype, and it is of these prompts and completions.

        Args:
            split: Of each completion the prompt.
            completion_ids: `(R, T)`.
            completion_mask: `(R, T)`.
            dtype: That products are kept in.
        """
        if not self.is_kept or self.kept != dtype:
            return False
        samples = completion_ids.shape[0] // len(self.rows.owner)
        if samples * len(self.rows.owner) != completion_ids.shape[0]:
            return False
        prefix = split.prefix_ids.tolist()
        given = [prefix + ids for ids in token_lists(split.rest_ids, split.rest_mask)]
        if given != [ids for ids in self.rows.token_lists() for _ in range(samples)]:
            return False
        if self.completions is None:
            return True
        return self.completions == token_lists(completion_ids, completion_mask)

    def forget_keys(self) -> None:
        """Drop keys and values, which only a rollout needs."""
        self.keys, self.values = [], []

    @property
    def nbytes(self) -> int:
        """Memory of what is kept for a later pass."""
        halves = [half for layer in self._layers.values() for half in layer if half is not None]
        parts = [part for half in halves for part in (half.scale, half.out, *half.products)]
        return sum(part.numel() * part.element_size() for part in parts)


@torch.no_grad()
def read_prompts(
    decoder: Decoder,
    split: SplitPrompts,
    dtype: torch.dtype,
    rounded: Decoder | None = None,
    keep: bool = False,
) -> ReadPrompts:
    """Read prompts, as the beginning of a rollout.

    Args:
        decoder: Of the model, see `decoder_of`.
        split: The prompts, less what all begin with.
        dtype: Of the matrix products, see `products`.
        rounded: The same model in that dtype, where there is one; weights are cast without it.
        keep: Keep what a later pass over the same prompts would compute again.
    """
    rows = prompt_rows(split, decoder.heads)
    own = decoder if rounded is None else rounded
    hidden = embedding(rows.ids, decoder.embedding.weight).float()  # (M, D)
    run = pass_over(decoder, rows.groups, rows.positions, hidden, dtype)
    keys, values = [], []
    layers: list[LayerResults] = []
    with torch.autocast("cpu", enabled=False):
        for layer, rounded_layer in zip(decoder.layers, own.layers, strict=True):
            found = attend_rows(hidden, layer, rounded_layer, run)
            keys.append(found.turned[:, decoder.heads :].clone())
            values.append(found.values if keep else found.values.clone())
            attended, is_last = found.results.out, layer is decoder.layers[-1]
            if is_last:  # nothing looks at the other tokens any more
                hidden, attended = hidden[rows.last], attended[rows.last]
            more, _ = mlp_rows(hidden, attended, layer, rounded_layer, run)
            if keep:
                layers.append((found.results, None if is_last else more))
            hidden = more.out
    return ReadPrompts(decoder, rows, keys, values, decoder.norm(hidden), layers, dtype)
