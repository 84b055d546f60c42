"""Calls of transformers' own models: passes over rows, the key/value cache, decoding steps on it.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache` and will drop
the old name in 5.40; older versions, and models that others wrote, know only the old one.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.losses.masking import position_ids
from sdft_lightning.types import Tokens

NEW, OLD = "cache", "past_key_values"


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument by which `model` takes a cache.

    Args:
        model: A model of transformers.
        cache: A cache of transformers, or None.

    Returns:
        `{name: cache}`, with the name that the model's `forward` has.
    """
    return {_argument_name(type(model).forward): cache}


@lru_cache(maxsize=64)
def _argument_name(forward: Callable[..., Any]) -> str:
    return NEW if NEW in inspect.signature(forward).parameters else OLD


def cache_of(output: Any) -> Any:
    """The cache in what a model has returned."""
    found = getattr(output, NEW, None)
    return getattr(output, OLD) if found is None else found


class Lengths(NamedTuple):
    """Sequences that lie end to end in one row.

    Attributes:
        ends: `(R + 1,)` int32, 0 and the cumulative lengths.
        longest: Tokens of the longest one.
    """

    ends: Tensor
    longest: int

    @staticmethod
    def of(lengths: Tensor) -> Lengths:
        """Of `(R,)` lengths, on the device where they are."""
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (R + 1,)
        return Lengths(ends, int(lengths.max()))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments by which transformers hands them to an attention kernel."""
        ends, longest = self.ends, self.longest
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }


class Inputs(NamedTuple):
    """Arguments of a pass over rows.

    Attributes:
        ids: `(G, L)`.
        mask: `(G, K + L)` boolean, or `(G, 1, L, K + L)` to be added to attention scores; None
            where rows begin in column 0 and each token sees all before it.
        positions: `(G, L)`; None where the mask is.
        cache: Keys and values of K columns before; None without any.
        lengths: Of sequences that lie end to end in the only row, whose positions start anew with
            each; without mask and cache.
    """

    ids: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    cache: Any = None
    lengths: Lengths | None = None

    @staticmethod
    def behind(tokens: Tokens, before: Tensor | None = None, cache: Any = None) -> Inputs:
        """Rows that may be padded, behind what is in a cache.

        Args:
            tokens: `(G, L)`.
            before: `(G, K)` which of the cached columns are no padding; None without any.
            cache: Their keys and values.
        """
        mask = tokens.mask if before is None else torch.cat([before, tokens.mask], dim=1)
        first = mask.shape[1] - tokens.ids.shape[1]
        return Inputs(tokens.ids, mask, position_ids(mask)[:, first:], cache)

    def arguments(self, part: Any, fill: bool) -> dict[str, Any]:
        """Keyword arguments of a model or its base.

        Args:
            part: Which is called.
            fill: Return keys and values, those of the cache among them.
        """
        if self.lengths is not None:
            return {
                "input_ids": self.ids,
                "position_ids": self.positions,
                "use_cache": fill,
                **self.lengths.arguments(),
            }
        if self.mask is None:
            return {"input_ids": self.ids, **without_cache(part)}
        mask = self.mask.long() if self.mask.dtype == torch.bool else self.mask
        return {
            "input_ids": self.ids,
            "attention_mask": mask,
            "position_ids": self.positions,
            **cache_argument(part, self.cache),
            "use_cache": fill or self.cache is not None,
        }


def run(model: Any, inputs: Inputs, fill: bool = False) -> Any:
    """What the decoder below the head of a causal language model returns.

    Args:
        model: A causal language model of transformers.
        inputs: Of the pass.
        fill: Return keys and values, too.
    """
    base = model.base_model
    return base(**inputs.arguments(base, fill))


Appending = Literal["masked", "unmasked", "grouped"]


class Decoding(ABC):
    """Rows that grow by one token at each step. Whoever is made has read the prompts.

    Attributes:
        logits: `(R, V)` of what follows the prompts.
        drops_rows: Whether `keep` is possible.
    """

    logits: Tensor
    drops_rows: bool = True

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Append `(R,)` tokens; logits `(R, V)`."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, which are named in ascending order."""

    def finish(self, completions: Tokens) -> None:  # noqa: B027 - most have nothing to do
        """End; no step can follow.

        Args:
            completions: `(R, T)` all that was appended, padded on the right, of all rows.
        """


class CachedSteps(Decoding):
    """Reads prompts into a cache and appends one token a row at each call.

    Args:
        model: A causal language model of transformers, in eval mode.
        appending: masked: with the mask of all columns and positions; unmasked: the prompts so,
            the tokens behind them with positions only; grouped: rows of equal length, without
            either.
        inputs: `(B, P)` prompts, padded on the left.

    Attributes:
        logits: `(B, V)` that predict the token after each prompt.
    """

    def __init__(self, model: Any, appending: Appending, inputs: Inputs) -> None:
        assert inputs.mask is not None
        self.model, self.appending, self.mask = model, appending, inputs.mask
        if appending == "grouped":
            arguments = {"input_ids": inputs.ids, "use_cache": True}
        else:
            arguments = inputs.arguments(model, fill=True)
        output = model(**arguments, **_last_logits_only(model))
        self.cache = cache_of(output)
        self.logits: Tensor = output.logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Append `(B,)` tokens; logits `(B, V)`."""
        column = torch.ones_like(self.mask[:, :1])  # (B, 1)
        self.mask = torch.cat([self.mask, column], dim=1)  # (B, L + 1)
        options: dict[str, Any] = {}
        if self.appending == "masked":
            options["attention_mask"] = self.mask.long()
        if self.appending != "grouped":
            options["position_ids"] = position_ids(self.mask)[:, -1:]
        output = self.model(
            input_ids=tokens.unsqueeze(-1),
            **options,
            **cache_argument(self.model, self.cache),
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def repeat(self, times: int) -> None:
        """Repeat each row, next to itself."""
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, dim=0)  # (B · times, L)
        self.logits = self.logits.repeat_interleave(times, dim=0)  # (B · times, V)

    def keep(self, rows: Tensor) -> None:
        """Keep some rows, in the order in which they are named."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]  # (A, L)


class FilledCache(NamedTuple):
    """Prompts that a model has read.

    Attributes:
        cache: Keys and values of each layer, `(B, K, L, E)`; or `(1, K, N, E)` of prompts that lay
            end to end.
        mask: `(B, L)` which columns are no padding.
        logits: `(B, V)` that predict the token after each prompt.
        order: `(B, L)` where each column is among the N; None where columns are what is cached.
    """

    cache: Any
    mask: Tensor
    logits: Tensor
    order: Tensor | None = None

    def take(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Remove keys and values `(B, K, L, E)` of one of the cache's layers, and return them."""
        found = layer.keys, layer.values
        layer.keys = layer.values = None
        if self.order is None:
            return found
        keys, values = (part[0][:, self.order].transpose(0, 1) for part in found)
        return keys, values


def read_end_to_end(model: Any, prompts: Tokens) -> FilledCache:
    """Read prompts in one row, without padding and mask.

    Args:
        model: A causal language model of transformers whose attention takes lengths.
        prompts: `(B, P)`, padded on the left.
    """
    ids, mask = prompts
    lengths = mask.sum(dim=1)  # (B,)
    positions = position_ids(mask)[mask].unsqueeze(0)  # (1, N)
    inputs = Inputs(ids[mask].unsqueeze(0), positions=positions, lengths=Lengths.of(lengths))
    output = run(model, inputs, fill=True)
    last = output.last_hidden_state[0, lengths.cumsum(0) - 1]  # (B, D)
    order = mask.long().flatten().cumsum(0).view(mask.shape) - 1  # (B, P)
    head = model.get_output_embeddings()
    return FilledCache(cache_of(output), mask, head(last), order.clamp(min=0))


@lru_cache(maxsize=256)
def takes(forward: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name."""
    return name in inspect.signature(forward).parameters


def without_cache(part: Any) -> dict[str, Any]:
    """The arguments that keep a model, or its base, from filling a cache."""
    return {"use_cache": False} if takes(type(part).forward, "use_cache") else {}


def _last_logits_only(model: Any) -> dict[str, Any]:
    name = "logits_to_keep"
    return {name: 1} if takes(type(model).forward, name) else {}
