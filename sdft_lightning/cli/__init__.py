"""The command line: `main`, which answers what it can before torch and Lightning are imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdft_lightning.cli.entry import main

if TYPE_CHECKING:
    from sdft_lightning.cli.command import SDFTCLI, run_problem

__all__ = ["SDFTCLI", "main", "run_problem"]


def __getattr__(name: str) -> Any:
    """Import what needs Lightning when it is first asked for (PEP 562)."""
    if name in __all__:
        from sdft_lightning.cli import command

        return getattr(command, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
