"""The key/value cache under both of its names in transformers.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache` and will drop
the old name in 5.40; older versions, and models that others wrote, know only the old one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

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
