"""Constructors are short, share nothing, and at most two classes lie above a method."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import sdft_lightning
from sdft_lightning import modules

PACKAGE = Path(sdft_lightning.__file__).parent
METHODS = [getattr(modules, name) for name in modules.__all__]


def constructors() -> dict[str, list[str]]:
    """The arguments of each constructor of the package, a line each, with type and default."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                    arguments = [*each.args.posonlyargs, *each.args.args[1:], *each.args.kwonlyargs]
                    found[f"{path.relative_to(PACKAGE)} {node.name}"] = list(
                        map(ast.unparse, arguments)
                    )
    return found


def test_no_two_constructors_share_six_arguments() -> None:
    found = constructors()
    assert len(found) > 50
    shared = {
        (one, other): sorted({*found[one]} & {*found[other]})
        for one, other in combinations(found, 2)
        if len({*found[one]} & {*found[other]}) >= 6
    }
    assert shared == {}


@pytest.mark.parametrize("method", METHODS)
def test_method_declares_what_it_adds_and_takes_at_most_thirteen(method: Any) -> None:
    taken: set[str] = set()
    for kind in method.__mro__[: method.__mro__.index(L.LightningModule)]:
        own = [] if "__init__" not in vars(kind) else inspect.signature(kind).parameters.values()
        names = {each.name for each in own if each.kind is not each.VAR_KEYWORD}
        assert not names & taken, f"{kind.__name__} declares {names & taken} anew"
        taken |= names
    # What is hard-coded in a call of super() counts, too.
    assert len(taken) <= (13 if method is modules.SDFTModule else 15)
    assert len(method.__mro__[: method.__mro__.index(L.LightningModule)]) <= 3


def test_no_arguments_help_is_written_twice() -> None:
    kinds = {kind for method in METHODS for kind in method.__mro__ if kind.__module__[:4] == "sdft"}
    lines = Counter(
        line.strip()
        for kind in kinds
        for line in (kind.__doc__ or "").partition("Args:")[2].splitlines()
        if line.strip() and "kwargs:" not in line and line.strip() != "Attributes:"
    )
    assert [line for line, count in lines.items() if count > 1] == []


@pytest.mark.parametrize("method", [each for each in METHODS if each is not modules.PolicyModule])
def test_method_says_whose_text_who_teaches_and_what_is_compared(method: Any) -> None:
    words = ("- Text: ", "- Teacher: ", "- Compared: ")
    assert all(word in method.__doc__ for word in words), method.__doc__
