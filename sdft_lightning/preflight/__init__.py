"""Can this run work? Measured on a sample of rows before any training."""

from sdft_lightning.preflight.measure import run_preflight
from sdft_lightning.preflight.report import Limits, Report, Role, Verdict, judge

__all__ = ["Limits", "Report", "Role", "Verdict", "judge", "run_preflight"]
