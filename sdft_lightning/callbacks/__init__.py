"""What is written down, shown and exported while a run goes on, and what stops it."""

from __future__ import annotations

from typing import Any

import lightning as L

from sdft_lightning.callbacks.completion_log import CompletionLog, KLStrip
from sdft_lightning.callbacks.drift import DriftMonitor
from sdft_lightning.callbacks.export import ExportModel
from sdft_lightning.callbacks.metrics_log import ItemScores, MetricsLog, PredictionWriter
from sdft_lightning.callbacks.save_on_signal import SaveOnSignal
from sdft_lightning.callbacks.stops import CollapseGuard, TokenBudget
from sdft_lightning.callbacks.terminal import ResultTable, RunProgressBar
from sdft_lightning.files.whole_windows import WindowCheckpoint

__all__ = [
    "CHECKPOINT_OPTIONS",
    "CollapseGuard",
    "CompletionLog",
    "DriftMonitor",
    "ExportModel",
    "ItemScores",
    "KLStrip",
    "MetricsLog",
    "PredictionWriter",
    "ResultTable",
    "RunProgressBar",
    "SaveOnSignal",
    "TokenBudget",
    "WindowCheckpoint",
    "default_callbacks",
]

# How checkpoints are named, and that the newest is also there as last.ckpt.
CHECKPOINT_OPTIONS: dict[str, Any] = {
    "filename": "step-{step}",
    "auto_insert_metric_name": False,
    "save_last": True,
}


def default_callbacks(checkpoints: bool = True) -> list[L.Callback]:
    """New callbacks as the command line gives them to its trainer.

    They write metrics.jsonl, predictions.jsonl and, after a signal, checkpoints/last.ckpt into the
    trainer's `default_root_dir`: give each run one of its own.

    Args:
        checkpoints: Also the one that writes checkpoints; False with one of your own.
    """
    callbacks: list[L.Callback] = [
        MetricsLog(),
        PredictionWriter(),
        ResultTable(),
        RunProgressBar(),
        SaveOnSignal(),
    ]
    return [*callbacks, WindowCheckpoint(**CHECKPOINT_OPTIONS)] if checkpoints else callbacks
