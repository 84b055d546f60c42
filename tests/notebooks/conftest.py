"""The notebooks as they are stored, and what they leave when they run on the tiny model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
SAVE = """
with open({path!r}, "w") as file:
    json.dump({kept}, file, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
"""


@dataclass(frozen=True)
class Left:
    """What a notebook leaves."""

    values: dict[str, Any]  # variables by name, as JSON has them
    folders: list[Path]  # new ones below ROOT
    outputs: list[Any]

    def __getitem__(self, name: str) -> Any:
        """A variable."""
        return self.values[name]

    @property
    def pictures(self) -> int:
        """How many pictures are shown."""
        return sum("image/png" in output.get("data", {}) for output in self.outputs)

    @property
    def printed(self) -> str:
        """All that was printed."""
        return "".join(each["text"] for each in self.outputs if each.get("name") == "stdout")


@pytest.fixture
def read_notebook() -> Callable[[str], Any]:
    """A stored notebook by its file's name."""
    return lambda name: nbformat.read(ROOT / "notebooks" / name, as_version=nbformat.NO_CONVERT)


@pytest.fixture
def parameters_cell() -> Callable[[Any], Any]:
    """The one cell of a notebook whose values a user may want to change."""

    def find(notebook: Any) -> Any:
        tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        assert len(tagged) == 1, "exactly one cell must have the tag parameters"
        return tagged[0]

    return find


@pytest.fixture
def is_explained(read_notebook: Callable[[str], Any]) -> Callable[[str], bool]:
    """Whether the notebook that explains what is logged names a quantity, or the end of it."""
    cells = read_notebook("02_read_a_run.ipynb").cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return lambda name: f"`{name}`" in text or f"`{name.rpartition('/')[2]}`" in text


@pytest.fixture
def execute(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    read_notebook: Callable[[str], Any],
    parameters_cell: Callable[[Any], Any],
) -> Callable[..., Left]:
    """Run a notebook on the tiny model for two steps and return what it leaves: `keep`, by name.

    A cell given as `after` (id of the cell before, source) is put in. The kernel works in an empty
    folder, and `ROOT` holds somebody's file already: both stay as they are.
    """
    _prepare_kernel(monkeypatch, tmp_path / "jupyter")
    cwd, root, left = tmp_path / "cwd", tmp_path / "root", tmp_path / "left.json"
    for folder in (cwd, root):
        folder.mkdir()
    (root / "mine.txt").write_text("kept")

    def run(
        name: str, keep: list[str], after: tuple[str, str] | None = None, **parameters: Any
    ) -> Left:
        notebook = read_notebook(name)
        given = {"MODEL": str(model_folder), "STEPS": 2, "ROOT": str(root), **parameters}
        _set(parameters_cell(notebook), given)
        if after is not None:
            (place,) = [i for i, each in enumerate(notebook.cells) if each.id == after[0]]
            notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(after[1]))
        kept = f"dict({', '.join(f'{each}={each}' for each in keep)})"
        notebook.cells.append(nbformat.v4.new_code_cell(SAVE.format(path=str(left), kept=kept)))
        resources = {"metadata": {"path": str(cwd)}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
        assert list(cwd.iterdir()) == []
        assert (root / "mine.txt").read_text() == "kept"
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        folders = [path for path in root.iterdir() if path.name != "mine.txt"]
        return Left(json.loads(left.read_text()), folders, outputs)

    return run


def _prepare_kernel(monkeypatch: pytest.MonkeyPatch, jupyter: Path) -> None:
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(jupyter))
    # The kernel is another process: it must import this checkout, too.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def _set(cell: Any, given: dict[str, Any]) -> None:
    """Give the names that a cell of assignments sets other values."""
    defaults: dict[str, Any] = {}
    exec(cell.source, {}, defaults)
    assert given.keys() <= defaults.keys()  # for another name a value would change nothing
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in {**defaults, **given}.items())
