"""The folder of a run: whose it is, and what may be written there, by whom."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdft_lightning.errors import UserError, printable
from sdft_lightning.files.texts import json_text
from sdft_lightning.files.whole_files import append_whole, held_lock
from sdft_lightning.types import Items

if TYPE_CHECKING:
    import lightning as L  # what reads and watches runs needs none

log = logging.getLogger(__name__)

_LONGEST = 200  # bytes of a folder's name; file systems take 255

LOCK = ".lock"  # while a command writes into the folder
ITEM_SCORES = "item_scores.jsonl"  # a line for each measured set and metric


def named_folder(
    root: str, name: str, option: str = "run.name", root_option: str = "run.root"
) -> Path:
    """The folder of a run.

    Args:
        root: Folder of all runs.
        name: Of the run; with slashes for folders below.
        option: What gives the name.
        root_option: What gives the root.

    Returns:
        A path below `root`.

    Raises:
        UserError: If the name would lead to `root` itself or out of it, or no file system takes it.
    """
    parts = Path(name).parts
    odd = not name.isprintable() or any(len(part.encode()) > _LONGEST for part in parts)
    if not parts or Path(name).is_absolute() or ".." in parts or odd:
        raise UserError(
            f"{option}: got {name[:300]!r}, which names no folder below {root_option} ({root}). "
            "Allowed is a name such as first, or sweep/first; give another root with "
            f"--{root_option}."
        )
    return Path(root) / name


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Keep the folder of a run to one command, until it ends in whatever way.

    Args:
        folder: The run's folder; made, and removed if nothing is in it.

    Raises:
        UserError: If another process writes into it.
        OSError: If it cannot be made.
    """
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    if (
        getattr(rank_zero_only, "rank", 0) != 0
    ):  # a process of the command whose process zero holds the lock
        yield
        return
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        with held_lock(
            folder / LOCK,
            lambda holder: (
                f"run.name: the folder {folder} is being written into by process {holder}. Wait "
                "for it or end it, or choose another name with --run.name (a checkpoint of this "
                "run can be measured there, with the path of its file as --ckpt_path)."
            ),
            remove=True,
        ):
            yield
    finally:
        for each in (folder, *missing):
            with suppress(OSError):
                each.rmdir()


def resolve_checkpoint(ckpt_path: str | None, folder: Path) -> str | None:
    """The path of the checkpoint that a command names.

    Args:
        ckpt_path: A path, `last` for the newest of the run, or None.
        folder: The run's folder.

    Returns:
        The path of an existing file, or None.

    Raises:
        UserError: If there is none, or for `last` none that can be read.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        return str(_last_whole(folder))
    path = Path(ckpt_path)
    if not path.exists():
        raise _no_checkpoint(path, folder)
    return str(path)


def _last_whole(folder: Path) -> Path:
    """last.ckpt, if it can be read and none was written later and further on; else the newest.

    Later alone would not do: a copied folder has new times, and further alone neither: a run that
    was put back to an older checkpoint is not where it once was.
    """
    from sdft_lightning.files.checkpoint_io import load_checkpoint

    last = folder / "checkpoints" / "last.ckpt"
    steps: dict[Path, int] = {}
    for path in sorted(_checkpoints(folder), key=_written, reverse=True):
        try:
            steps[path] = int(load_checkpoint(path)["global_step"])
        except (UserError, KeyError) as error:
            log.warning(f"{error} It is skipped.")
    if not steps:
        raise _no_checkpoint(last, folder)
    found = last if last in steps else next(iter(steps))
    further = [
        path
        for path, step in steps.items()
        if step > steps[found] and _written(path) > _written(found)
    ]
    found = max(further, key=lambda path: (steps[path], _written(path)), default=found)
    if found != last:
        log.warning(f"ckpt_path: last stands for {found}, the newest that can be read.")
    return found


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, with those that Lightning writes for SLURM."""
    return [*(folder / "checkpoints").glob("*.ckpt"), *folder.glob("hpc_ckpt_*.ckpt")]


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _no_checkpoint(path: Path, folder: Path) -> UserError:
    known = sorted(str(found) for found in (folder / "checkpoints").glob("*.ckpt"))
    what = "is no checkpoint that can be read" if path.exists() else f"is no checkpoint {path}"
    return UserError(f"ckpt_path: there {what}. This run has {', '.join(known) or 'none yet'}.")


def requeued_checkpoint(folder: Path) -> str | None:
    """What a job that SLURM has started again goes on from, without being told.

    Args:
        folder: The run's folder.

    Returns:
        The newest checkpoint of the run; None in a job's first life, or if there is none.
    """
    return resolve_checkpoint("last", folder) if is_requeued() and _checkpoints(folder) else None


def is_requeued() -> bool:
    """Whether SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0) > 0


def check_run_folder(folder: Path, ckpt_path: str | None) -> None:
    """Refuse to train into the folder of another run.

    Args:
        folder: The run's folder.
        ckpt_path: The checkpoint that the run goes on from, if any.

    Raises:
        UserError: If the folder holds a run and `ckpt_path` is not one of its checkpoints.
    """
    if not folder.is_dir() or all(
        _is_command_folder(path) or path.name == LOCK for path in folder.iterdir()
    ):
        return
    if ckpt_path is None and not _checkpoints(folder):
        if is_requeued():
            return  # ended before its first checkpoint: it starts anew, beside what it wrote
        raise begun_elsewhere(folder)
    if ckpt_path is None:
        raise UserError(
            f"run.name: the folder {folder} already holds a run, and nothing is overwritten. "
            "Choose another name with --run.name, or go on with that run with --ckpt_path=last."
        )
    if folder.resolve() not in Path(ckpt_path).resolve().parents:
        raise UserError(
            f"run.name: the folder {folder} already holds a run, and {ckpt_path} is not one of "
            "its checkpoints. Choose another name with --run.name."
        )


def begun_elsewhere(folder: Path) -> UserError:
    """The error about a folder that a run has begun in."""
    return UserError(
        f"run.name: the folder {folder} already holds a run, which has no checkpoint yet, and "
        "nothing is overwritten. Choose another name with --run.name, or move the folder away."
    )


def _is_command_folder(path: Path) -> bool:
    """Whether a folder is one that `command_folder` made: measured before training, say."""
    return re.fullmatch(r"(validate|test|predict|preflight)-\d+", path.name) is not None


def command_folder(folder: Path, command: str) -> Path:
    """Where a command writes: fit into the run's folder, the others into one of their own in it.

    Args:
        folder: The run's folder.
        command: fit, validate, test, predict, preflight or export.

    Returns:
        The run's folder, or a new one `<command>-<n>` below it.
    """
    if command in ("fit", "export"):
        return folder
    number = 0
    while (folder / f"{command}-{number}").exists():
        number += 1
    return folder / f"{command}-{number}"


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of the run; the command line sets it to runs/<name>."""
    return Path(trainer.default_root_dir)


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a JSON Lines file, made if absent; no line is ever half there.

    What is no number (NaN, an infinity) is written as null.
    """
    append_whole(path, "".join(json_text(each) + "\n" for each in records))


class ItemKey(NamedTuple):
    """Whose scores items have.

    Attributes:
        kind: task (a graded set) or capability (a benchmark), as in the names of metrics.
        task: Name of the set.
        metric: accuracy, or the benchmark's.
    """

    kind: str
    task: str
    metric: str

    @property
    def name(self) -> str:
        """The set with its metric, as in the names of metrics."""
        return f"{self.task}/{self.metric}"


class MeasuredItems(NamedTuple):
    """A line of item_scores.jsonl: by which command and at which step, whose scores, and those."""

    command: str
    step: int
    key: ItemKey
    items: Items


def append_items(folder: Path, stage: str, measured: list[MeasuredItems]) -> None:
    """Append a line for each measured set and metric to item_scores.jsonl.

    Args:
        folder: Where the command writes.
        stage: validation or test, as in metrics.jsonl.
        measured: What was measured at once.
    """
    records: list[dict[str, Any]] = []
    for command, step, key, items in measured:
        record = {"stage": stage, "command": command, "step": step, **key._asdict()}
        record |= {"content": items.content, "scores": items.scores}
        records.append(record if items.weights is None else {**record, "weights": items.weights})
    if records:
        append_lines(folder / ITEM_SCORES, records)


def read_items(path: Path, option: str) -> list[MeasuredItems]:
    """Read an item_scores.jsonl, in its order.

    Args:
        path: The file.
        option: What names it, for messages.

    Raises:
        UserError: Names file and line where it is none.
    """
    found: list[MeasuredItems] = []
    # Not splitlines(): that also cuts at characters that names may hold, like U+2028.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_parsed(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{option}: {path}, line {number} holds no scores of items "
                f"({type(error).__name__}: {printable(str(error), 80)}). Allowed is the folder of "
                f"a run, or a file {ITEM_SCORES} that fit, validate or test wrote there; take the "
                "line out, or name another."
            ) from error
    return found


def _parsed(record: dict[str, Any]) -> MeasuredItems:
    key = ItemKey(*(str(record[name]) for name in ItemKey._fields))
    scores = {k: math.nan if x is None else float(x) for k, x in record["scores"].items()}
    weights = record.get("weights")
    weights = None if weights is None else {k: float(x) for k, x in weights.items()}
    items = Items(scores, str(record["content"]), weights)
    return MeasuredItems(str(record["command"]), int(record["step"]), key, items)


def unused_path(path: Path) -> Path:
    """`path`, or with -1, -2, … before its suffix if there is such a file or folder already."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def tensorboard(trainer: L.Trainer) -> Any | None:
    """The TensorBoard writer of the run, if it has one."""
    from lightning.pytorch.loggers import TensorBoardLogger

    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.experiment
    return None
