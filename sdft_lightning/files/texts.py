"""JSON that every parser reads, and YAML that comes to no more than it looks."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import yaml

from sdft_lightning.errors import UserError


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, characters outside ASCII as they are.

    Args:
        value: Of mappings, lists, texts, numbers, booleans and None.
        indent: Spaces a level; one line without it.
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """What tells one value from another, in 16 characters; what is not JSON counts as its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


# Whole runs are some hundred values in some kilobytes.
_MAX_CHARACTERS = 2**20
_MAX_VALUES = 100_000

# Written in C where PyYAML has it; it also limits how deep values may be nested.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str, where: str) -> None:
    """Refuse a text that is too long, or too many values once its aliases are written out.

    Args:
        text: YAML; what is malformed is left to whoever loads it.
        where: File or option, for messages.

    Raises:
        UserError: If it is too large, or an alias stands inside of what it names.
    """
    if len(text) > _MAX_CHARACTERS:
        raise UserError(
            f"{where}: {len(text):,} characters of YAML, allowed are {_MAX_CHARACTERS:,}. Options "
            "are far fewer; data belong into a file of their own."
        )
    if "*" not in text or "&" not in text:
        return
    try:
        root = yaml.compose(text, Loader=_LOADER)
        count = 0 if root is None else _values(root, {}, where)
    except yaml.YAMLError:
        return
    except RecursionError as error:
        raise UserError(f"{where}: YAML that is nested too deeply. Write it plainly.") from error
    if count > _MAX_VALUES:
        raise UserError(
            f"{where}: its aliases (*name) come to more than {_MAX_VALUES:,} values when they are "
            "written out. Write the values themselves."
        )


def _values(node: yaml.Node, known: dict[int, int], where: str) -> int:
    """Values below a node, itself included, aliases counted as often as they stand there."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise UserError(
                f"{where}: an alias (*name) stands inside of what it names. Take it out."
            )
        return known[id(node)]
    known[id(node)] = 0  # not yet known
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_values(each, known, where) for each in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_values(each, known, where) for pair in node.value for each in pair)
    known[id(node)] = total
    return total


def bound_config_files() -> None:
    """Let jsonargparse refuse such texts, in config files and in options alike."""
    import jsonargparse

    loader = jsonargparse.get_loader("yaml")
    if getattr(loader, "is_bounded", False):
        return

    def load(value: str) -> Any:
        check_yaml(value, "config")
        return loader(value)

    load.is_bounded = True  # type: ignore[attr-defined]
    jsonargparse.set_loader("yaml", load, (yaml.YAMLError,))
