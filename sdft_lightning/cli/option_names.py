"""Options of Lightning's Trainer by name, read from its source, which takes no import of torch."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sdft_lightning.errors import UserError

_PREFIX = "--trainer."


def check_trainer_names(words: Sequence[str]) -> None:
    """Refuse options of the Trainer that it does not have, before it is imported.

    Args:
        words: The command line. All else is left to the command's own parser.

    Raises:
        UserError: Names these options.
    """
    given = {word: _name(word) for word in words if word.startswith(_PREFIX)}
    if not given or "--help" in words or "-h" in words:
        return
    known = trainer_names()
    unknown = [word for word, name in given.items() if known and name not in known]
    if unknown:
        raise UserError(
            f"unrecognized arguments: {' '.join(unknown)}. The trainer has no such option; "
            "`--help` lists those that it has."
        )


def _name(word: str) -> str:
    """`callbacks` of `--trainer.callbacks+=X` and of `--trainer.callbacks.monitor=y`."""
    return word.removeprefix(_PREFIX).partition("=")[0].partition(".")[0].removesuffix("+")


def trainer_names() -> set[str]:
    """What Lightning's Trainer takes; nothing where its source is not found."""
    spec = find_spec("lightning")
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = Path(*folders[:1], "pytorch", "trainer", "trainer.py")
    if not path.is_file():
        return set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                    arguments = [*each.args.args[1:], *each.args.kwonlyargs]
                    return {argument.arg for argument in arguments}
    return set()
