"""Names of monitors are checked against what a fit will log, before any model is loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft_lightning.errors import UserError
from sdft_lightning.files.whole_windows import WindowCheckpoint, validates_in_fit
from sdft_lightning.graders.texts import AnswerShape
from sdft_lightning.modules.capability import PAIRED_FIGURES
from sdft_lightning.modules.evaluation import usage_names
from sdft_lightning.types import TaskData

log = logging.getLogger(__name__)

_ALWAYS = ("epoch", "step")  # what Lightning adds to the names of checkpoints
_SHOWN = 20
_LONGEST = 200  # bytes of a file name; file systems take 255
_LARGER_IS_BETTER = ("accuracy", "accuracy_low", "accuracy_high", "retention", "top1_agreement")
_KNOWN_HOUSES = ("sdft_lightning", "lightning", "pytorch_lightning")


class _Watch(NamedTuple):
    """A place where a name of something logged is given."""

    option: str
    name: str
    also: tuple[str, ...] = ()  # names that are allowed, too


def check_monitors(module: Any, trainer: Any, data: TaskData | None) -> None:
    """Refuse a monitor, or a file name of checkpoints, that names nothing that a fit logs.

    Where a module, data module or callback of somebody else may log more, a warning is given.

    Args:
        module: The `PolicyModule`.
        trainer: Of a fit.
        data: The data module, set up; None for one that is not asked.

    Raises:
        UserError: Says which names there are, the nearest first.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint):
            _check_filename(callback)
    watched = [each for callback in trainer.callbacks for each in _watched(callback)]
    if not watched:
        return
    callbacks = [*trainer.callbacks, *module.configure_callbacks()]
    measured = validation_names(module, data, callbacks)
    validated = validates_in_fit(trainer, None if data is None else data.batches_per_epoch)
    names = training_names(module, trainer, callbacks) + measured
    never = "" if validated else _never_validated(trainer)
    all_known = data is not None and all(map(_is_known, (module, data, *trainer.callbacks)))
    for option, name, also in watched:
        if name in also or (name in names and not (never and name in measured)):
            continue
        problem = f"{option}: got {name!r}, which this run does not log. {never}"
        problem += f"Allowed are, the nearest first: {_nearest(name, names)}."
        if all_known:
            raise UserError(problem)
        log.warning(f"{problem} Unless code of your own logs it, the run will end there.")
    for callback in trainer.callbacks:
        _warn_of_mode(callback)


def training_names(module: Any, trainer: Any, callbacks: Iterable[Any]) -> list[str]:
    """What steps log.

    Args:
        module: The `PolicyModule`.
        trainer: Of a fit.
        callbacks: All that run, with those that the module brings.
    """
    found = list(module.step_names)
    for callback in callbacks:
        if hasattr(callback, "step_names"):
            found += callback.step_names(module, trainer)
    return sorted(set(found))


def validation_names(module: Any, data: TaskData | None, callbacks: Iterable[Any]) -> list[str]:
    """What the validations of a fit log.

    Args:
        module: The `PolicyModule`.
        data: The data module, set up; None for one that is not asked.
        callbacks: All that run.
    """
    found: list[str] = []
    items: list[str] = []  # sets and metrics whose items are compared with the base's
    for task, taught in ({} if data is None else data.graded("validate")).items():
        roles = ["accuracy"] + (["teacher_accuracy"] if module.grades_in_fit(taught) else [])
        found += [f"task/{task}/{role}{end}" for role in roles for end in ("", "_low", "_high")]
        found += [f"task/{task}/answer_{each}" for each in AnswerShape._fields]
        items += [f"{task}/{role}" for role in roles]
    if data is not None and data.judge is not None:
        found += [f"judge/{name}" for name in usage_names(data.judge)]
    if data is not None and data.benchmark_suite is not None:
        found += [f"capability/{name}" for name in data.benchmark_suite.metric_names()]
        items += data.benchmark_suite.item_names()
    found += paired_names(module, data, items)
    for callback in callbacks:
        found += getattr(callback, "validation_names", [])
    return sorted({f"val/{name}" for name in found})


def paired_names(module: Any, data: TaskData | None, items: list[str]) -> list[str]:
    """What a fit logs of its items compared with the base's; nothing where it has no base.

    Args:
        module: The `PolicyModule`.
        data: The data module, set up; None for one that is not asked.
        items: The sets with their metrics, `<set>/<metric>`.
    """
    base = [key.name for key in module.evaluator.paired.named_base()]
    if not base and data is not None and data.benchmark_suite is not None:
        base = items  # what has benchmarks is measured before the first step
    return [f"paired/{name}/{what}" for name in items if name in base for what in PAIRED_FIGURES]


def _watched(callback: Any) -> Iterator[_Watch]:
    kind = _kind(callback)
    is_checkpoint = isinstance(callback, ModelCheckpoint)
    monitor = getattr(callback, "monitor", None)
    if isinstance(monitor, str):
        yield _Watch(f"{kind}.monitor", monitor, _ALWAYS if is_checkpoint else ())
    if is_checkpoint:  # what it does not know, Lightning writes as 0
        for name in re.findall(r"\{([^:}]+)", callback.filename or ""):
            yield _Watch(f"{kind}.filename", name, (*_ALWAYS, str(monitor)))


def _check_filename(callback: ModelCheckpoint) -> None:
    """Refuse a file name that cannot be written, or leads out of the folder of checkpoints."""
    filename = callback.filename or ""
    names = re.findall(r"\{([^:}]+)", filename)
    problem = "a name below the folder of checkpoints" if ".." in Path(filename).parts else ""
    if re.search(r"\{[^}]*:[^}]*(\{|\d{4})", filename):  # it would be padded to gigabytes
        problem = "a format of fixed widths below 1000"
    else:
        try:
            ones = {name: torch.tensor(1) for name in (*names, *_ALWAYS)}
            written = Path(callback.format_checkpoint_name(ones)).name
            if len(written.encode()) > _LONGEST:
                problem = f"a name of at most {_LONGEST} bytes, written out"
        except (ValueError, KeyError, IndexError) as error:
            problem = f"a format that Python takes ({error})"
    if problem or Path(filename).is_absolute():
        raise UserError(
            f"{_kind(callback)}.filename: got {filename[:100]!r}; it must be "
            f"{problem or 'a name below the folder of checkpoints'}, e.g. step-{{step}}."
        )


def _kind(callback: Any) -> str:
    return "checkpoint" if type(callback) is WindowCheckpoint else type(callback).__name__


def _never_validated(trainer: Any) -> str:
    return (
        "No validation falls into it, which logs what begins with val/ "
        f"(trainer.val_check_interval is {trainer.val_check_interval}, check_val_every_n_epoch "
        f"{trainer.check_val_every_n_epoch}, limit_val_batches {trainer.limit_val_batches}): "
        "validate more often. "
    )


def _nearest(name: str, names: list[str]) -> str:
    def distance(other: str) -> float:
        mine, theirs = (text.replace("/", "_").lower() for text in (name, other))
        last, their_last = mine.rpartition("_")[2], theirs.rpartition("_")[2]
        whole = SequenceMatcher(None, mine, theirs).ratio()
        return -max(whole, SequenceMatcher(None, last, their_last).ratio())

    near = sorted(names, key=distance)
    more = f" and {len(near) - _SHOWN} more" if len(near) > _SHOWN else ""
    return f"{', '.join(near[:_SHOWN])}{more}"


def _is_known(part: Any) -> bool:
    """Whether all that an object logs is known: it is Lightning's or this package's."""
    return type(part).__module__.partition(".")[0] in _KNOWN_HOUSES


def _warn_of_mode(callback: Any) -> None:
    """Tell of a monitor that keeps, or waits for, the worst."""
    monitor = str(getattr(callback, "monitor", ""))
    if monitor.endswith(_LARGER_IS_BETTER) and getattr(callback, "mode", "") == "min":
        kind = _kind(callback)
        log.warning(
            f"{kind}.mode: min takes the lowest {monitor} for the best. Set {kind}.mode to max."
        )
