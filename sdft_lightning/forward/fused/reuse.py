"""What sampling has computed, stored for the student's pass over the same tokens.

The weights do not move between sampling and training. So the prompts are read once for both, and
the forward pass over a completion has been made by the time that the completion is there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from sdft_lightning.forward.fused.blocks import attend_rows, mlp_rows
from sdft_lightning.forward.fused.common import Results, pass_over
from sdft_lightning.forward.fused.rows import PromptRows, prompt_rows, with_completions
from sdft_lightning.forward.fused.structure import Decoder
from sdft_lightning.forward.layout import SplitPrompts
from sdft_lightning.types import Tokens

# Of a layer: its attention, and its MLP where that is computed at all tokens.
LayerResults = tuple[Results, Results | None]


class ReadPrompts:
    """What reading prompts has computed, and later what sampling their completions has.

    Args:
        decoder: Whose embeddings and norms were used.
        rows: The prompts, M tokens.
        keys: Of each layer `(M, K, E)`, rotated, float32.
        values: Of each layer `(M, K, E)`, in the dtype that products are stored in.
        last: `(B, D)` states of each row's last token, normed.
        layers: What a pass over prompts and completions need not compute again, layer by layer.
        stored: The dtype that products are stored in.

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
        stored: torch.dtype,
    ) -> None:
        self.decoder, self.rows, self.last = decoder, rows, last
        self.keys, self.values, self.stored = keys, values, stored
        self.completions: list[list[int]] | None = None
        self._layers: dict[int, LayerResults] = dict(enumerate(layers))

    @property
    def is_stored(self) -> bool:
        """Whether there is anything for a later pass."""
        return bool(self._layers)

    def layer(self, place: int) -> LayerResults:
        """Remove the results of a layer, and return them.

        Raises:
            KeyError: Where they were not stored, or were removed before.
        """
        return self._layers.pop(place)

    def add(self, place: int, results: LayerResults) -> None:
        """Store results of a layer, in place of those that were removed."""
        self._layers[place] = results

    def fits(self, split: SplitPrompts, completions: Tokens, dtype: torch.dtype) -> bool:
        """Whether results are stored, in this dtype, and are of these prompts and completions.

        Args:
            split: The prompts.
            completions: `(R, T)`, as many of each prompt as of any other.
            dtype: That products are stored in.
        """
        if not self.is_stored or self.stored != dtype:
            return False
        samples = completions.ids.shape[0] // len(self.rows.owner)
        if samples * len(self.rows.owner) != completions.ids.shape[0]:
            return False
        prefix = split.prefix_ids.tolist()
        given = [prefix + ids for ids in split.rest.lists()]
        given = [ids for ids in given for _ in range(completions.ids.shape[0] // len(given))]
        if given != [ids for ids in self.rows.token_lists() for _ in range(samples)]:
            return False
        if self.completions is None:
            return True
        return self.completions == completions.lists()

    def forget_keys(self) -> None:
        """Drop keys and values, which only a rollout needs."""
        self.keys, self.values = [], []

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored for a later pass."""
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
        dtype: Of the matrix products, see `precision`.
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


# Bytes that may be stored of rows of later micro-batches, of their prompts and of their completions
# each; those of the first are used at once.
MOST_BYTES = 3 * 2**28

# Of a layer and the rows of a step: scale, products and result of its attention, and of its MLP.
StepResults = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Recording:
    """Results of the first rows, step by step.

    Args:
        layers: Layers of the model.
        rows: Rows of the first micro-batch, and of all that are recorded.
    """

    def __init__(self, layers: int, rows: tuple[int, int]) -> None:
        self.first, self.recorded = rows
        self._layers: list[list[StepResults]] = [[] for _ in range(layers)]
        self._rows: list[Tensor] = []  # of each step, (n,) ascending
        self._bytes = 0  # of rows that are not the first micro-batch's

    def begin(self, rows: Tensor) -> None:
        """A step over so many rows.

        Args:
            rows: `(S,)` ascending; some may have ended, and are never asked for.
        """
        if self._bytes > MOST_BYTES and self.recorded > self.first:
            self.recorded, self._bytes = self.first, 0
            counts = [int((rows < self.first).sum()) for rows in self._rows]
            for place, steps in enumerate(self._layers):
                self._layers[place] = [
                    _first(step, count) for step, count in zip(steps, counts, strict=True)
                ]
            self._rows = [rows[:count] for rows, count in zip(self._rows, counts, strict=True)]
        self._rows.append(rows[rows < self.recorded])

    def add(self, layer: int, results: StepResults) -> None:
        """The results of a layer, for all rows of the step."""
        count = self._rows[-1].numel()
        if not count:
            return
        if count < results[0].shape[0]:
            results = _first(results, count)
        self._layers[layer].append(results)
        later = 1 - int((self._rows[-1] < self.first).sum()) / count
        self._bytes += int(later * sum(part.numel() * part.element_size() for part in results))

    def places(self, rows: int, steps: int) -> Tensor:
        """Where each token is among all that were recorded, `(rows, steps)`."""
        found = torch.zeros(rows, steps, dtype=torch.long)
        start = 0
        for step, of_step in enumerate(self._rows):
            found[of_step, step] = torch.arange(start, start + of_step.numel())
            start += of_step.numel()
        return found

    def take(self, layer: int) -> list[Tensor]:
        """All results of a layer, one below the other; they are no longer held."""
        steps, self._layers[layer] = self._layers[layer], []
        return [torch.cat(list(parts)) for parts in zip(*steps, strict=True)]


def _first(results: StepResults, count: int) -> StepResults:
    """Of the first rows only, in memory of their own."""
    scale, products, out, more_scale, gates, hidden = (part[:count].clone() for part in results)
    return scale, products, out, more_scale, gates, hidden


def recorded_rows(prompts: list[ReadPrompts], samples: int) -> tuple[int, int]:
    """Rows of the first micro-batch, and of all those at the beginning whose prompts are stored."""
    counts = []
    for part in prompts:
        if not part.is_stored:
            break
        counts.append(samples * len(part.rows.owner))
    return (counts[0], sum(counts)) if counts else (0, 0)


def store_steps(
    recording: Recording,
    prompts: list[ReadPrompts],
    samples: int,
    completions: Tokens,
) -> None:
    """Give each part of the prompts what was recorded of its completions.

    Args:
        recording: Is empty afterwards.
        prompts: In the order of the rows.
        samples: Completions of each prompt (n).
        completions: `(B · n, T)`, padded on the right.
    """
    length = completions.ids.shape[1]
    if length < 2:
        return
    places = recording.places(recording.recorded, length - 1)  # (rows, T - 1)
    taken: list[tuple[ReadPrompts, Tensor]] = []
    start = 0
    for part in prompts:
        end = start + samples * len(part.rows.owner)
        if end > recording.recorded:
            break
        own = completions.rows(slice(start, end))
        rows = with_completions(part.rows, own, part.decoder.heads)
        inputs = own.mask[:, 1:]  # (R, T - 1) tokens that another one follows
        index = torch.empty(rows.ids.numel() - rows.prompts, dtype=torch.long)
        index[rows.predicting[:, 1:][inputs] - rows.prompts] = places[start:end][inputs]
        if index.numel():
            part.completions = own.lists()
            taken.append((part, index))
        start = end
    for layer in range(len(prompts[0].decoder.layers)):
        results = recording.take(layer)
        for part, index in taken:
            scale, products, out, *mlp = (each[index] for each in results)
            part.add(layer, _joined(part.layer(layer), (scale, products, out), mlp))


def _joined(known: LayerResults, attention: tuple[Tensor, ...], mlp: list[Tensor]) -> LayerResults:
    """Results of prompts, and behind them those of their completions."""
    first, second = known
    return _behind(first, *attention), None if second is None else _behind(second, *mlp)


def _behind(known: Results, scale: Tensor, products: Tensor, out: Tensor) -> Results:
    return Results(
        torch.cat([known.scale, scale]),
        (*known.products, products),
        torch.cat([known.out, out]),
    )
