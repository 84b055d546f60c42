"""What many runs came to: tables, plots, paired tests and one page, from their results files."""

from sdft_lightning.report.command import report_command, write_report

__all__ = ["report_command", "write_report"]
