"""Demonstrations: read, checked, rendered, tokenized and served as Lightning data modules."""

from sdft_lightning.data.datamodule import DemonstrationDataModule
from sdft_lightning.data.rows import Columns
from sdft_lightning.data.sources import HubSource

__all__ = ["Columns", "DemonstrationDataModule", "HubSource"]
