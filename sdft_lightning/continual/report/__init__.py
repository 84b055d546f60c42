"""What many runs came to: tables, plots, paired tests and one page, from their results files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdft_lightning.continual.report.command import report_command

if TYPE_CHECKING:
    from sdft_lightning.continual.report.writing import write_report

__all__ = ["report_command", "write_report"]


def __getattr__(name: str) -> Any:
    """Import what draws and computes when it is first asked for (PEP 562)."""
    if name == "write_report":
        from sdft_lightning.continual.report.writing import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
