"""The cache is handed over under the name that a model's forward has."""

import warnings
from types import SimpleNamespace
from typing import Any

import torch

from sdft_lightning.forward.kv_cache import cache_argument, cache_of


class Old:
    def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...


class New:
    def forward(self, input_ids: Any, cache: Any = None) -> None: ...


def test_the_name_follows_the_model() -> None:
    assert cache_argument(Old(), 1) == {"past_key_values": 1}
    assert cache_argument(New(), None) == {"cache": None}


def test_the_output_is_read_under_either_name() -> None:
    assert cache_of(SimpleNamespace(past_key_values=1)) == 1
    assert cache_of(SimpleNamespace(cache=2, past_key_values=1)) == 2


def test_the_installed_transformers_neither_warns_nor_loses_the_cache(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        first = model(input_ids=ids[:, :2], use_cache=True)
        rest = model(input_ids=ids[:, 2:], use_cache=True, **cache_argument(model, cache_of(first)))
        whole = model(input_ids=ids)
    torch.testing.assert_close(rest.logits[:, -1], whole.logits[:, -1])
