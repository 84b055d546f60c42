"""Demonstrations: read, checked, rendered, tokenized and served as Lightning data modules."""

from sdft_lightning.data.benchmark_data import BenchmarkDataModule
from sdft_lightning.data.datamodule import DemonstrationDataModule
from sdft_lightning.data.model_data import ModelDataModule
from sdft_lightning.data.rows import Columns
from sdft_lightning.data.sources import HubSource

__all__ = [
    "BenchmarkDataModule",
    "Columns",
    "DemonstrationDataModule",
    "HubSource",
    "ModelDataModule",
]
