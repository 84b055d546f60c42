"""Notebooks as they are stored: no outputs, parameters first, read by ruff, all explained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
Read = Callable[[str], Any]


def assigned(source: str) -> dict[str, Any]:
    """The names that a cell of plain assignments sets, with their values."""
    found = {}
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        (target,) = statement.targets
        assert isinstance(target, ast.Name)
        found[target.id] = ast.literal_eval(statement.value)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs_counts_and_traces_of_a_machine(
    path: Path, read_notebook: Read
) -> None:
    notebook = read_notebook(path.name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], cell.source
            assert cell.execution_count is None, cell.source
        assert set(cell.metadata) <= {"tags"}, cell.metadata
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_come_first_and_write_into_a_temporary_folder(
    path: Path, read_notebook: Read, parameters_cell: Callable[[Any], Any]
) -> None:
    notebook = read_notebook(path.name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0] is parameters_cell(notebook)
    found = assigned(code[0].source)
    assert found["MODEL"] == "embedded"
    assert found["STEPS"] >= 1
    assert found["ROOT"] is None


def test_ruff_reads_the_notebooks() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--show-files", str(ROOT)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert {str(path) for path in NOTEBOOKS} <= set(shown.splitlines())
    assert len(NOTEBOOKS) == 3


def test_every_quantity_that_the_architecture_page_lists_is_explained(
    is_explained: Callable[[str], bool],
) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = re.search(r"## What is logged\n(.*?)(?=\n## |\Z)", page, re.DOTALL)
    assert section is not None
    listed = [
        name for code in re.findall(r"`([^`]+)`", section[1]) for name in re.split(r",\s+", code)
    ]
    assert {"train/loss", "val/task/<name>/accuracy", "retention"} <= set(listed)
    ends = ("_low", "_high")  # of the accuracies, explained by their whole names
    assert [n for n in listed if n not in ends and not is_explained(n)] == []
