"""Many runs from one plan: methods x stages x seeds, resumable, results as JSON Lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdft_lightning.continual.main import run_continual
from sdft_lightning.continual.plan import ContinualPlan

if TYPE_CHECKING:
    from sdft_lightning.continual.stage_callbacks import ResumePoint, StageEnd

__all__ = ["ContinualPlan", "ResumePoint", "StageEnd", "run_continual"]


def __getattr__(name: str) -> Any:
    """Import the callbacks, which need torch, when they are first asked for (PEP 562)."""
    if name in __all__:
        from sdft_lightning.continual import stage_callbacks

        return getattr(stage_callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
