"""One act a file: what is written down, shown and exported while a run goes on."""

from sdft_lightning.callbacks.completion_log import CompletionLog, KLStrip
from sdft_lightning.callbacks.defaults import default_callbacks
from sdft_lightning.callbacks.drift import DriftMonitor
from sdft_lightning.callbacks.export import ExportModel
from sdft_lightning.callbacks.metrics_log import ItemScores, MetricsLog, PredictionWriter
from sdft_lightning.callbacks.save_on_signal import SaveOnSignal
from sdft_lightning.callbacks.stops import CollapseGuard, TokenBudget
from sdft_lightning.callbacks.terminal import ResultTable, RunProgressBar
from sdft_lightning.files.whole_windows import WindowCheckpoint

__all__ = [
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
