"""The key/value cache of transformers' own models, and decoding steps on it.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache` and will drop
the old name in 5.40; older versions, and models that others wrote, know only the old one.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

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
        ids: `(B, P)` prompts, padded on the left.
        mask: `(B, K + P)`.
        cache: K positions before them, computed already.

    Attributes:
        logits: `(B, V)` that predict the token after each prompt.
    """

    def __init__(
        self, model: Any, appending: Appending, ids: Tensor, mask: Tensor, cache: Any = None
    ) -> None:
        self.model, self.appending, self.mask = model, appending, mask
        options: dict[str, Any] = {}
        if appending != "grouped":
            options = {
                "attention_mask": mask.long(),
                "position_ids": position_ids(mask)[:, mask.shape[1] - ids.shape[1] :],
                **cache_argument(model, cache),
            }
        output = model(input_ids=ids, **options, use_cache=True, **_last_logits_only(model))
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
