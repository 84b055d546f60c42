"""Self-distillation fine-tuning for chat models: learn a new skill, keep the old ones.

What scripts and notebooks may use is listed in `__all__` and told in `docs/python.md`. A name is
imported when it is first asked for, so that `import sdft_lightning` itself takes no time.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdft_lightning.callbacks import (
        CollapseGuard,
        CompletionLog,
        DriftMonitor,
        ExportModel,
        ItemScores,
        KLStrip,
        MetricsLog,
        PredictionWriter,
        ResultTable,
        RunProgressBar,
        SaveOnSignal,
        TokenBudget,
        WindowCheckpoint,
        default_callbacks,
    )
    from sdft_lightning.callbacks.export import export_model
    from sdft_lightning.callbacks.stops import CollapseLimits
    from sdft_lightning.cli.entry import main
    from sdft_lightning.cli.run_trainer import RunTrainer
    from sdft_lightning.data import BenchmarkDataModule, Columns, DemonstrationDataModule, HubSource
    from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkTask
    from sdft_lightning.data.prompts import PromptStyle
    from sdft_lightning.data.sets import HeldOut
    from sdft_lightning.data.tokenize import Lengths
    from sdft_lightning.errors import UserError
    from sdft_lightning.forward.policy import Policy
    from sdft_lightning.graders import JudgeSettings
    from sdft_lightning.losses.divergence import Divergence
    from sdft_lightning.models.lora import LoRA
    from sdft_lightning.modules import (
        CPTModule,
        DFTModule,
        OfflineDistillationModule,
        PolicyModule,
        ReinvokeModule,
        SDFTModule,
        SFTKLModule,
        SFTModule,
    )
    from sdft_lightning.modules.evaluation import Evaluation
    from sdft_lightning.modules.run_callbacks import ValidateAtEnds
    from sdft_lightning.modules.schedule import Schedule
    from sdft_lightning.preflight import Limits
    from sdft_lightning.rollout import (
        Engine,
        Sampling,
        TransformersEngine,
        VLLMEngine,
        VLLMServerEngine,
    )
    from sdft_lightning.rollout.mismatch import Mismatch
    from sdft_lightning.teacher import EMATeacher, FrozenTeacher, LiveTeacher, Teacher

# Linux: large tensors in pages of 2 MB. A decoding step on a CPU reads all weights, and finding
# their small pages took a fifth of it. torch looks once, at its first tensor; "0" turns it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

# Where the names of the block above are at run time.
_PLACES = {
    "BenchmarkDataModule": "data",
    "BenchmarkTask": "data.benchmarks",
    "Benchmarks": "data.benchmarks",
    "CPTModule": "modules",
    "CollapseGuard": "callbacks",
    "CollapseLimits": "callbacks.stops",
    "Columns": "data",
    "CompletionLog": "callbacks",
    "DFTModule": "modules",
    "DemonstrationDataModule": "data",
    "Divergence": "losses.divergence",
    "DriftMonitor": "callbacks",
    "EMATeacher": "teacher",
    "Engine": "rollout",
    "Evaluation": "modules.evaluation",
    "ExportModel": "callbacks",
    "FrozenTeacher": "teacher",
    "HeldOut": "data.sets",
    "HubSource": "data",
    "ItemScores": "callbacks",
    "JudgeSettings": "graders",
    "KLStrip": "callbacks",
    "Lengths": "data.tokenize",
    "Limits": "preflight",
    "LiveTeacher": "teacher",
    "LoRA": "models.lora",
    "MetricsLog": "callbacks",
    "Mismatch": "rollout.mismatch",
    "OfflineDistillationModule": "modules",
    "Policy": "forward.policy",
    "PolicyModule": "modules",
    "PredictionWriter": "callbacks",
    "PromptStyle": "data.prompts",
    "ReinvokeModule": "modules",
    "ResultTable": "callbacks",
    "RunProgressBar": "callbacks",
    "RunTrainer": "cli.run_trainer",
    "SDFTModule": "modules",
    "SFTKLModule": "modules",
    "SFTModule": "modules",
    "Sampling": "rollout",
    "SaveOnSignal": "callbacks",
    "Schedule": "modules.schedule",
    "Teacher": "teacher",
    "TokenBudget": "callbacks",
    "TransformersEngine": "rollout",
    "UserError": "errors",
    "VLLMEngine": "rollout",
    "VLLMServerEngine": "rollout",
    "ValidateAtEnds": "modules.run_callbacks",
    "WindowCheckpoint": "callbacks",
    "default_callbacks": "callbacks",
    "export_model": "callbacks.export",
    "main": "cli.entry",
}

__all__ = [
    "BenchmarkDataModule",
    "BenchmarkTask",
    "Benchmarks",
    "CPTModule",
    "CollapseGuard",
    "CollapseLimits",
    "Columns",
    "CompletionLog",
    "DFTModule",
    "DemonstrationDataModule",
    "Divergence",
    "DriftMonitor",
    "EMATeacher",
    "Engine",
    "Evaluation",
    "ExportModel",
    "FrozenTeacher",
    "HeldOut",
    "HubSource",
    "ItemScores",
    "JudgeSettings",
    "KLStrip",
    "Lengths",
    "Limits",
    "LiveTeacher",
    "LoRA",
    "MetricsLog",
    "Mismatch",
    "OfflineDistillationModule",
    "Policy",
    "PolicyModule",
    "PredictionWriter",
    "PromptStyle",
    "ReinvokeModule",
    "ResultTable",
    "RunProgressBar",
    "RunTrainer",
    "SDFTModule",
    "SFTKLModule",
    "SFTModule",
    "Sampling",
    "SaveOnSignal",
    "Schedule",
    "Teacher",
    "TokenBudget",
    "TransformersEngine",
    "UserError",
    "VLLMEngine",
    "VLLMServerEngine",
    "ValidateAtEnds",
    "WindowCheckpoint",
    "default_callbacks",
    "export_model",
    "main",
]


def __getattr__(name: str) -> Any:
    """Import one of the names in `__all__` when it is first asked for (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
