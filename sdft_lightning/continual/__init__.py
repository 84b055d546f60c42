"""Many runs from one plan: methods x stages x seeds, resumable, results as JSON Lines."""

from sdft_lightning.continual.main import run_continual
from sdft_lightning.continual.plan import ContinualPlan
from sdft_lightning.continual.stage_callbacks import ResumePoint, StageEnd

__all__ = ["ContinualPlan", "ResumePoint", "StageEnd", "run_continual"]
