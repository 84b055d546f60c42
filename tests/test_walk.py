"""The way of a row that docs/architecture.md lists is the one that it takes."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sdft_lightning"


def listed() -> list[tuple[str, str]]:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = re.search(r"## A row's way\n(.*?)(?=\n## )", page, re.DOTALL)
    assert section is not None
    assert len(section[1].splitlines()) <= 40
    return re.findall(r"^\d+\. `([^`]+)` `([^`]+)`", section[1], re.MULTILINE)


def test_a_row_passes_the_files_in_the_order_of_the_page(
    run_cli: Callable[..., None], fit_args: list[str]
) -> None:
    walk = listed()
    files = [file for file, _ in walk]
    assert len(files) == len(set(files)) > 15
    passed: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        # Others call some of these earlier; what counts is that one comes behind the other.
        if event != "call" or len(passed) == len(walk):
            return
        file, name = walk[len(passed)]
        if frame.f_code.co_name == name and frame.f_code.co_filename == str(PACKAGE / file):
            passed.append((file, name))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run_cli(*fit_args)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert passed == walk
