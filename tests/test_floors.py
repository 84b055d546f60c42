"""Keeps the floors of DESIGN: a room of the package imports only from lower floors.

A room is a module or sub-package directly under `sdft_lightning`. A new room is entered in
`FLOORS`; an exception, should one ever be right, in `ALLOWANCES` with its reason.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sdft_lightning"

# docs/architecture.md lists what each room holds.
FLOORS: dict[str, int] = {
    "__init__": 8,  # names for scripts, imported when they are asked for
    "types": 0,
    "errors": 0,
    "models": 1,
    "files": 2,
    "losses": 2,
    "forward": 3,
    "graders": 3,
    "data": 4,
    "rollout": 4,
    "teacher": 4,
    "callbacks": 5,
    "modules": 5,
    "preflight": 5,
    "continual": 6,
    "cli": 7,
}
MOST_ROOMS, MOST_FLOORS = 15, 8
# (importing room, imported room): why it is right although the floors forbid it.
ALLOWANCES: dict[tuple[str, str], str] = {}
# (importing room, imported room): why it is wrong although the floors allow it.
FORBIDDEN = {("modules", "data"): "modules and data meet only in types"}


def room_of(path: Path, package: Path) -> str:
    """Name the room that a file belongs to."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_modules(path: Path, package: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the dotted name, split, of all that a file imports from the package.

    Imports inside functions and under `TYPE_CHECKING` count: they tie rooms together as well.
    """
    location = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = location[: len(location) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name[0] == package.name)


def imported_rooms(path: Path, package: Path) -> list[tuple[int, str]]:
    """List the line and the room of all that a file imports from the package."""
    rooms = {room_of(file, package) for file in package.rglob("*.py")} | set(FLOORS)
    entered = {(line, name[1]) for line, name in imported_modules(path, package) if name[1:]}
    # `from sdft_lightning import __version__` enters no room, what is offered to scripts does.
    named = {(line, name) for line, name in entered if not name.startswith("__")}
    return sorted((line, name if name in rooms else "__init__") for line, name in named)


def violations(package: Path) -> list[str]:
    """List what breaks the floors, one line for each import, ready to be read."""
    found = []
    for path in sorted(package.rglob("*.py")):
        room = room_of(path, package)
        if room not in FLOORS:
            found.append(f"{path.name}: room {room!r} has no floor; enter it in FLOORS")
            continue
        for line, other in imported_rooms(path, package):
            if other == room or (room, other) in ALLOWANCES:
                continue
            where = f"{path.relative_to(package)}:{line}: {room} imports {other}"
            if (room, other) in FORBIDDEN:
                found.append(f"{where}: {FORBIDDEN[room, other]}")
            elif FLOORS.get(other, len(FLOORS)) >= FLOORS[room]:
                found.append(f"{where}, which is not on a lower floor")
    return found


def test_package_keeps_its_floors() -> None:
    assert list(PACKAGE.rglob("*.py")), f"no package at {PACKAGE}"
    assert violations(PACKAGE) == []


def test_rooms_and_floors_are_few() -> None:
    rooms = {room_of(path, PACKAGE) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(FLOORS) - {"__init__"}
    assert len(rooms) <= MOST_ROOMS
    assert len({FLOORS[room] for room in rooms}) <= MOST_FLOORS


def fused_importers(package: Path) -> set[str]:
    """The rooms in which a file imports something of fused blocks."""
    fused = [package.name, "forward", "fused"]
    return {
        room_of(path, package)
        for path in package.rglob("*.py")
        for _, name in imported_modules(path, package)
        if name[:3] == fused
    }


def test_fused_blocks_are_known_where_passes_are_made_and_nowhere_else() -> None:
    assert fused_importers(PACKAGE) == {"forward", "rollout"}


def test_whoever_else_knows_fused_blocks_is_found(tmp_path: Path) -> None:
    package = tmp_path / "sdft_lightning"
    (package / "modules").mkdir(parents=True)
    (package / "modules" / "sdft.py").write_text("from ..forward.fused import decoder_of\n")
    (package / "types.py").write_text("from sdft_lightning.forward import fused\n")
    assert fused_importers(package) == {"modules", "types"}


def test_every_allowance_is_used() -> None:
    pairs = {
        (room_of(path, PACKAGE), other)
        for path in PACKAGE.rglob("*.py")
        for _, other in imported_rooms(path, PACKAGE)
    }
    assert set(ALLOWANCES) <= pairs


@pytest.mark.parametrize(
    ("file", "line", "breaks"),
    [
        ("types.py", "from sdft_lightning.losses.masking import loss_mask", True),  # same floor
        ("types.py", "from sdft_lightning import errors", True),
        ("types.py", "import sdft_lightning.modules.sdft as sdft", True),
        ("types.py", "from . import teacher", True),
        ("types.py", "from .teacher import EMATeacher", True),
        ("types.py", "def f():\n    from sdft_lightning.cli import main", True),
        ("types.py", "if TYPE_CHECKING:\n    from sdft_lightning.cli import main", True),
        ("data/collation.py", "from ..rollout import Sampling", True),
        ("data/collation.py", "from ..modules.base import Base", True),
        ("modules/sdft.py", "from sdft_lightning.data import collation", True),
        ("modules/deep/er.py", "from ...data import collation", True),
        ("attic.py", "import torch", True),  # no floor
        ("demo.py", "from sdft_lightning import SDFTModule", True),  # what is for scripts
        ("__init__.py", "from sdft_lightning.cli.entry import main", False),
        ("types.py", "from sdft_lightning import __version__", False),
        ("types.py", "import torch, sdft_lightning_other.cli", False),
        ("modules/sdft.py", "from .base import Base", False),
        ("modules/sdft.py", "from . import base", False),
        ("modules/sdft.py", "from ..types import Rollout", False),
        ("modules/sdft.py", "from sdft_lightning.rollout import generate_rollout", False),
        ("cli.py", "from sdft_lightning.data.collation import collate", False),
    ],
)
def test_checker_tells_what_breaks_the_floors(
    file: str, line: str, breaks: bool, tmp_path: Path
) -> None:
    path = tmp_path / "sdft_lightning" / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert len(violations(tmp_path / "sdft_lightning")) == int(breaks)
