"""Demonstrations: read, checked, rendered, tokenized and served as Lightning data modules.

The names are imported when they are asked for (PEP 562): what reads rows, or runs a program in the
sandbox, needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdft_lightning.data.benchmark_data import BenchmarkDataModule, ModelDataModule
    from sdft_lightning.data.datamodule import DemonstrationDataModule
    from sdft_lightning.data.rows import Columns
    from sdft_lightning.data.sources import HubSource

_PLACES = {
    "BenchmarkDataModule": "benchmark_data",
    "Columns": "rows",
    "DemonstrationDataModule": "datamodule",
    "HubSource": "sources",
    "ModelDataModule": "benchmark_data",
}

__all__ = [
    "BenchmarkDataModule",
    "Columns",
    "DemonstrationDataModule",
    "HubSource",
    "ModelDataModule",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found
