"""`python -O` leaves asserts out: none of them may do anything that the program needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sdft_lightning"
ASK_ONLY = {"isinstance", "len"}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def own_properties() -> set[str]:
    """Names of the package's properties, which are calls that do not look like it."""
    found = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(each, ast.Name) and each.id in ("property", "cached_property")
                for each in node.decorator_list
            ):
                found.add(node.name)
    return found


def test_no_assert_calls_anything_that_may_act() -> None:
    properties, wrong = own_properties(), []
    assert "window_ends" in properties
    for path, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assert):
                continue
            for part in ast.walk(node.test):
                asks = isinstance(part, ast.Call) and ast.unparse(part.func) not in ASK_ONLY
                reads = isinstance(part, ast.Attribute) and part.attr in properties
                if asks or reads or isinstance(part, ast.NamedExpr | ast.Await):
                    wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


OPTIMIZED = """
import sys
from types import SimpleNamespace
from torch import nn
from sdft_lightning.modules import SDFTModule, sdft
from sdft_lightning.modules.evaluation import Evaluation
from sdft_lightning.rollout import StudentPasses, student

sdft.is_sharded = student.is_sharded = lambda model: True
module, asked = SDFTModule(evaluation=Evaluation(teacher_in_fit=True)), []
module.teacher.model = nn.Linear(1, 1)
StudentPasses.sampler = lambda passes: asked.append(type(passes.model).__name__)
module._trainer = SimpleNamespace(global_step=1, state=SimpleNamespace(fn="fit"))
module.gather()
print(sys.flags.optimize, asked)
"""


def test_optimized_interpreter_gathers_student_and_teacher_on_all_processes() -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-c", OPTIMIZED], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["1 ['NoneType', 'Linear']"], done.stderr
