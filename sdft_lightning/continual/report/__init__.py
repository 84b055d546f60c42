"""What many runs came to: tables, plots, paired tests and one page, from their results files.

What draws and computes is imported when it is first asked for (PEP 562).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdft_lightning.continual.report.writing import write_report

__all__ = ["report_command", "write_report"]


def report_command(args: Sequence[str]) -> None:
    """Run `report` with these arguments.

    Raises:
        UserError: If a results file cannot be read.
    """
    options = _parser().parse_args(args)
    from sdft_lightning.continual.report.writing import write_report

    wanted = options.output_dir or options.results[0].parent / "report"
    write_report(options.results, wanted)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdft report",
        description="Tables, plots, paired tests and one HTML page from results of `continual`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS", help="results.jsonl files"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder to write, report beside the first file without it; one with files in it is "
        "left alone, and -1, -2 ... is added to the name",
    )
    return parser


def __getattr__(name: str) -> Any:
    if name == "write_report":
        from sdft_lightning.continual.report.writing import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
