"""What Lightning and jsonargparse refuse before anything has run, as a sentence for the user."""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft_lightning.errors import UserError

_THEIRS = (
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "jsonargparse",
    "docstring_parser",
)
_OURS = "sdft_lightning"
_MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "precision")
_LONGEST = 400


def setup_error(error: Exception, config: Mapping[str, Any]) -> UserError | None:
    """What an error of the libraries means that set a command up.

    Args:
        error: It came before anything was measured or trained.
        config: The command's options, as far as they were read.

    Returns:
        A sentence that names the options that were given; None for errors of this package's own code
        and of the user's, which are faults to be seen with their traceback.
    """
    if isinstance(error, UserError) or not _is_theirs(error):
        return None
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    given = _given(config)
    mentioned = [name for name in given if re.search(rf"\b{name.partition('.')[2]}\b", text)]
    shown = mentioned or list(given)
    listed = ", ".join(f"{name.removeprefix('trainer.')} {given[name]}" for name in shown)
    remedy = f"Correct {' or '.join(f'--{name}' for name in mentioned) or 'them'}"
    if any(name.removeprefix("trainer.") in _MACHINE for name in shown):
        remedy += "; `auto` takes the accelerator and the devices that this machine has"
    return UserError(
        f"trainer: Lightning refuses these options: {text.rstrip('.')}. Given were "
        f"{listed or 'none'}. {remedy}."
    )


def _given(config: Mapping[str, Any]) -> dict[str, str]:
    """The options that are not as Lightning has them, by name."""
    found: dict[str, str] = {}
    for part, kind in (("trainer", L.Trainer), ("checkpoint", ModelCheckpoint)):
        defaults = inspect.signature(kind.__init__).parameters
        for name, value in dict(config.get(part) or {}).items():
            if name in defaults and value != defaults[name].default:
                found[f"{part}.{name}"] = _shown(value)
    return found


def _shown(value: Any) -> str:
    """An option's value as a user writes it; of a class, its name."""
    if isinstance(value, list):
        return ", ".join(_shown(each) for each in value)
    if hasattr(value, "get") and value.get("class_path"):
        return str(value["class_path"]).rpartition(".")[2]
    return repr(value)


def _is_theirs(error: Exception) -> bool:
    """Whether Lightning or jsonargparse has raised an error, or a library that it has called.

    It is decided by the last frame that is theirs, ours or the user's own.
    """
    installed = [str(Path(path).resolve()) for path in set(sysconfig.get_paths().values()) if path]
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        house = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if house in _THEIRS:
            return True
        file = str(Path(frame.f_code.co_filename).resolve())
        if house == _OURS or not (file.startswith("/<") or file.startswith(tuple(installed))):
            return False
    return False
