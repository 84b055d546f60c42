"""What Lightning and jsonargparse refuse before anything has run, as a sentence for the user."""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft_lightning.errors import UserError, printable, renamed_options

_THEIRS = ("lightning", "lightning_fabric", "lightning_utilities", "jsonargparse")
_OURS = "sdft_lightning"
_RESTORING = "lightning.pytorch.trainer.connectors.checkpoint_connector"
_MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "precision")
_LONGEST = 400
_SHOWN = 80  # characters of a value
# How jsonargparse names an option that a class does not have.
_REFUSED = re.compile(r"(?:Option '|unrecognized arguments: --)([\w.]+)")
_CLASSES = {
    "loggers": "trainer.logger",
    "callbacks": "trainer.callbacks",
    "plugins": "trainer.plugins",
    "strategies": "trainer.strategy",
    "profilers": "trainer.profiler",
}
# What jsonargparse tells of its own types; patterns over a text in one line, and what they become.
_NOISE = (
    (r'Parser key "[^"]+":', ""),
    (r"Does not validate against any of the Union subtypes", ""),
    (r"Subtypes: .*?Errors:", ""),
    (r"- Expected a <class 'NoneType'>", ""),
    (r"Given value type: <class '[^']*'>", ""),
    (r"- Expected a path but .*? either not accessible or invalid", ""),
    (r"Subclass types expect one of:.*?(?=Given value|$)", ""),
    (r"Problem with given class_path 'sdft_lightning\.[^']*':", ""),
    (r"NestedArg\(key='[^']*', val='([^']*)'\)", r"\1"),
    (r"Type collections\.abc\.Callable\[.*?\] expects a function or a callable class:", ""),
    (r"typing\.Literal\[(.*?)\]", r"one of \1"),
    (r"Expected a one of", "Expected one of"),
    (r"<class '([^']*)'>", r"\1"),
)


def setup_error(error: Exception, config: Mapping[str, Any]) -> UserError | None:
    """What an error of the libraries means that set a command up.

    Args:
        error: It came before anything was measured or trained.
        config: The command's options, as far as they were read.

    Returns:
        A sentence that names the options that were given; None for errors of this package's own
        code and of the user's, which are faults to be seen with their traceback.
    """
    if any(isinstance(each, UserError) for each in _chain(error)):
        return None
    path = config.get("ckpt_path")
    if path is not None and _restores(error):
        return UserError(
            f"ckpt_path: training cannot go on from {path}: {type(error).__name__}: "
            f"{printable(str(error))}. It may be damaged, or of another version of Lightning. Name "
            "an older one of the run's checkpoints/ folder."
        )
    if not _is_theirs(error):
        return None
    option, text = _plain(str(error) or type(error).__name__)
    if option == "model" and (told := renamed_options(_REFUSED.findall(text))):
        return UserError(told)
    if option or isinstance(error, ArgumentError):
        return UserError(f"{option}{': ' if option else ''}{text.rstrip('.')}.")
    given = _given(config)
    mentioned = [name for name, value in given.items() if _mentions(text, name, value)]
    shown = mentioned or [name for name in given if name.startswith("trainer.")]
    listed = ", ".join(f"{name.removeprefix('trainer.')} {given[name]}" for name in shown)
    remedy = f"Correct {' or '.join(f'--{name}' for name in mentioned) or 'them'}"
    if any(name.removeprefix("trainer.") in _MACHINE for name in shown):
        remedy += "; `auto` takes the accelerator and the devices that this machine has"
    return UserError(
        f"trainer: Lightning refuses these options: {text.rstrip('.!')}. Given were "
        f"{listed or 'none'}. {remedy}."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _plain(text: str) -> tuple[str, str]:
    """The option that jsonargparse names, if any, and what is wrong, without its inner workings."""
    text = " ".join(text.split())
    options: list[str] = []
    for name in re.findall(r'Parser key "([^"]+)"', text):
        if options and f"{name}.".startswith(f"{options[-1]}."):
            options.pop()  # it is named anew, and to the end
        options.append(name)
    for pattern, instead in _NOISE:
        text = re.sub(pattern, instead, text)
    before, _, after = text.partition("Given value: ")
    parts = [" ".join(part.split()) for part in re.split(r"(?:^|\s)- ", before)]
    parts = [part for part in dict.fromkeys(parts) if part.strip(" :;")]
    for kind, option in _CLASSES.items():
        if not options and f"class_path 'lightning.pytorch.{kind}" in text:
            options.append(option)
    if any(part.startswith("Problem with") for part in parts):  # not that it is nothing else
        parts = [part for part in parts if not part.startswith("Expected a ")]
    parts = [part for part in parts if not part.startswith("Unable to load config")] or parts
    value = after.partition(" - ")[0].strip()
    got = f" (got {value})" if value and len(value) <= _SHOWN and "Got value" not in before else ""
    text = ("; ".join(parts) or " ".join(before.split())).rstrip(". ") + got
    return ".".join(options), text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _mentions(text: str, name: str, value: str) -> bool:
    """Whether a message is about an option, by its name or by a word that was given for it."""
    words = [name.partition(".")[2]] + ([value.strip("'")] if len(value) > 4 else [])
    return any(re.search(rf"\b{re.escape(word)}\b", text) for word in words)


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


def _restores(error: Exception) -> bool:
    """Whether Lightning was reading a checkpoint back when an error came."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == _RESTORING for frame, _ in frames)


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
