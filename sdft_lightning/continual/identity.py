"""Which plan a folder belongs to: a changed plan is refused, and the difference named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdft_lightning.continual.options import stage_data
from sdft_lightning.continual.plan import ContinualPlan
from sdft_lightning.continual.whole import write_whole
from sdft_lightning.data.sources import EXAMPLE_PREFIX, example_path
from sdft_lightning.errors import UserError
from sdft_lightning.errors.foreign_text import shown
from sdft_lightning.files.whole_files import check_can_make, held_lock

# What changes no result: where it runs, how often it can resume, and which seeds there are.
_NO_MATTER = ("name", "root", "seeds", "resume_every", "keep_checkpoints", "processes")
_MOST_NAMED = 5
_ABSENT = "absent"


def canonical_plan(plan: ContinualPlan) -> dict[str, Any]:
    """All that the results depend on, but for the seed: options, and the content of local files."""
    options = {name: value for name, value in asdict(plan).items() if name not in _NO_MATTER}
    return {"options": options, "files": dict(_files(plan))}


def plan_hash(canonical: Mapping[str, Any]) -> str:
    """SHA-256 of a canonical plan."""
    text = json.dumps(canonical, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def claim_folder(folder: Path, canonical: Mapping[str, Any], write: bool = True) -> None:
    """Make a folder this plan's, or see that it is.

    Args:
        folder: The plan's folder.
        canonical: See `canonical_plan`.
        write: Write plan.json where there is none.

    Raises:
        UserError: If the folder is another plan's, or holds something else.
    """
    if not write:
        _claim(folder, canonical, write)
        return
    check_can_make(folder, "root")
    with held_lock(
        folder / ".plan.json.lock",
        lambda holder: (
            f"name: process {holder} is making the folder {folder} its plan's. Wait a moment and "
            "give the command again."
        ),
        remove=True,
    ):
        _claim(folder, canonical, write)


def _claim(folder: Path, canonical: Mapping[str, Any], write: bool) -> None:
    path = folder / "plan.json"
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))["plan"]
        found = differences(there, canonical)
        if found:
            raise UserError(
                f"name: {folder} holds another plan, and results of two plans are not mixed. It "
                f"differs in {'; '.join(found)}. Give this plan another name, or put the old "
                "values back."
            )
        return
    # Another share may be writing its plan.json this very moment; its lock has that name, too.
    if folder.is_dir() and any(not file.name.startswith(".plan.json") for file in folder.iterdir()):
        raise UserError(
            f"name: the folder {folder} holds something that is no plan's. Give the plan another "
            "name."
        )
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"format": 1, "hash": plan_hash(canonical), "plan": canonical}
        write_whole(path, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def differences(there: Any, here: Any) -> list[str]:
    """Where two canonical plans differ: option, value there, value here; the first few."""
    here = json.loads(json.dumps(here))  # as JSON has it: no tuples, no keys but texts
    old, new = dict(_leaves(there)), dict(_leaves(here))
    found = [
        f"{name.removeprefix('options.')} (there {old.get(name, _ABSENT)}, here "
        f"{new.get(name, _ABSENT)})"
        for name in [*old, *(name for name in new if name not in old)]
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    ]
    more = len(found) - _MOST_NAMED
    return found if more <= 0 else [*found[:_MOST_NAMED], f"and {more} more"]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{place}]")
    else:
        yield name, json.dumps(value, ensure_ascii=False)


def _files(plan: ContinualPlan) -> Iterator[tuple[str, str]]:
    """Each local file or folder of data, and the SHA-256 of its content."""
    for option, source in sources_of(plan):
        path = local_path(source, option)
        if path is not None:
            yield str(source), _content_hash(path)


def sources_of(plan: ContinualPlan) -> Iterator[tuple[str, Any]]:
    """Every source of data with the option that names it."""
    for stage in plan.stages:
        data = stage_data(plan, stage)
        for split in ("train", "validation", "test"):
            if data.get(split) is not None:
                yield f"stages.{stage.name}.data.{split}", data[split]
    for name, held in plan.held_out.items():
        yield f"held_out.{name}.source", held.get("source")


def local_path(source: Any, option: str) -> Path | None:
    """Where a source lies; None for a data set on the Hub.

    Raises:
        UserError: If it should lie here and does not.
    """
    if isinstance(source, Mapping):
        return None
    if not isinstance(source, str):
        raise UserError(f"{option}: got {shown(source)}; name a file, a folder or {{repo, split}}.")
    if source.startswith(EXAMPLE_PREFIX):
        return example_path(source, option)
    path = Path(source).expanduser()
    folder = Path(source.rpartition(":")[0]).expanduser()  # of a split: folder:train
    found = path if path.exists() else folder
    if not source or not found.exists() or found == Path():
        raise UserError(
            f"{option}: there is no file or folder {source} (looked in {Path.cwd()}). Correct the "
            "path."
        )
    return found


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        digest.update(file.relative_to(path.parent).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
