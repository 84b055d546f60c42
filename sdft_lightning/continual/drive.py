"""Works through a plan: what is finished is left alone, what was interrupted goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from sdft_lightning.continual.commands import Command, RunFailed
from sdft_lightning.continual.plan import (
    BASE,
    ContinualPlan,
    Shard,
    Unit,
    chains_of,
    plan_folder,
    share_of,
)
from sdft_lightning.continual.plan_file import base_folder, evaluation_options, fit_options
from sdft_lightning.continual.records import (
    Key,
    all_records,
    curve,
    empty_record,
    measured,
)
from sdft_lightning.continual.stage_callbacks import FIT_RESULT
from sdft_lightning.errors import UserError, harmless
from sdft_lightning.files.run_folder import unused_path
from sdft_lightning.files.whole_files import append_record, held_lock, repair_records, write_whole

# The locks that a command's process keeps -> how it is carried out.
MakeCommand = Callable[[tuple[int, ...]], Command]


class Work(NamedTuple):
    """What the work on a share of a plan needs to know.

    Attributes:
        plan: The plan.
        plan_hash: Its hash, which every record holds.
        shard: The share.
        make_command: How commands are carried out.
    """

    plan: ContinualPlan
    plan_hash: str
    shard: Shard
    make_command: MakeCommand

    @property
    def folder(self) -> Path:
        """Folder of the plan."""
        return plan_folder(self.plan)

    @property
    def results(self) -> Path:
        """The file that this share's records go to."""
        return self.folder / self.shard.results_name

    def finished(self) -> dict[Key, dict[str, Any]]:
        """The records of finished runs, of all shares."""
        records = all_records(self.folder, self.plan_hash)
        return {key: found for key, found in records.items() if found["status"] == "finished"}


def work_through(work: Work) -> int:
    """Do what is not done of a share.

    Args:
        work: The share; its folder is this plan's already.

    Returns:
        How many chains have failed; the base model counts as one.
    """
    failed = 0
    locks = work.folder / "locks"
    with _held(locks / f"{work.results.stem}.lock", str(work.results)) as results_lock:
        repair_records(work.results)
        # The base model is evaluated once in a plan: by the first share.
        chains: list[list[Unit | None]] = [[None]] if work.shard.number == 1 else []
        chains += [[*chain] for chain in share_of(chains_of(work.plan), work.shard)]
        for chain in chains:
            name = BASE if chain[0] is None else f"{chain[0].method}-seed{chain[0].seed}"
            with _held(locks / f"{name}.lock", f"the chain {name}") as chain_lock:
                command = work.make_command((results_lock, chain_lock))
                failed += not _finish_chain(work, chain, command)
    return failed


def _held(path: Path, what: str) -> AbstractContextManager[int]:
    return held_lock(
        path,
        lambda holder: (
            f"name: another process works on {what} (process {holder} holds {path}). Wait for it "
            "or end it; to work beside it, give each process its own --shard."
        ),
    )


def _finish_chain(work: Work, chain: list[Unit | None], command: Command) -> bool:
    """Do the stages of a chain that are not done; false if one of them fails."""
    for unit in chain:
        key = (BASE, None, 0) if unit is None else unit.key
        if key not in work.finished():
            record = run_unit(work, unit, command)
            append_record(work.results, record)
            if record["status"] == "failed":
                print(f"failed: {record['run']}: {record['error']}", flush=True)
                return False
        if unit is not None and not work.plan.keep_checkpoints:
            remove_checkpoints(unit.folder)
    return True


def run_unit(work: Work, unit: Unit | None, command: Command) -> dict[str, Any]:
    """Train and evaluate a stage, or evaluate the base model without one; returns its record."""
    record = empty_record(work.plan, work.plan_hash, unit)
    print(f"\n=== {record['run']} ({time.strftime('%H:%M:%S')})", flush=True)
    try:
        fit: dict[str, Any] = {"updates": 0, "tokens": 0, "selected_step": 0, "seconds": 0.0}
        folder, model = base_folder(work.plan), None
        if unit is not None:
            folder = unit.folder
            fit = finish_fit(work.plan, unit, command)
            model = str(folder / fit["exported"])
            record["curve"] = curve(folder)
        record.update({name: fit[name] for name in ("updates", "tokens", "selected_step")})
        record["seconds"]["fit"] = fit["seconds"]
        start = time.monotonic()
        record.update(evaluate(work.plan, folder, model, command))
        record["seconds"]["evaluate"] = round(time.monotonic() - start, 1)
    except (RunFailed, UserError, OSError) as error:
        return {**record, "error": harmless(str(error))}
    return {**record, "status": "finished"}


def finish_fit(plan: ContinualPlan, unit: Unit, command: Command) -> dict[str, Any]:
    """Train a stage, go on where it was interrupted, or leave it alone if it is finished.

    Returns:
        The content of fit.json.
    """
    result = unit.folder / FIT_RESULT
    if not result.is_file():
        arguments = []
        if (unit.folder / "checkpoints" / "last.ckpt").exists():
            arguments = ["--ckpt_path=last"]
        elif unit.folder.exists():
            # Interrupted before the first resume point. Nothing of it is needed, nothing deleted.
            unit.folder.rename(unused_path(unit.folder.with_name(f"{unit.folder_name}-cut")))
        options = fit_options(plan, unit, _model_before(unit))
        command(["fit", _config(unit.folder, "fit", options), *arguments])
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def _model_before(unit: Unit) -> str | None:
    """The model that the stage before handed on; None at the first stage."""
    if unit.number == 1:
        return None
    (before,) = unit.chain.glob(f"{unit.number - 1}_*/{FIT_RESULT}")
    exported: str = json.loads(before.read_text(encoding="utf-8"))["exported"]
    return str(before.parent / exported)


def evaluate(
    plan: ContinualPlan, folder: Path, model: str | None, command: Command
) -> dict[str, Any]:
    """Measure a model on every stage's test set, the held-out sets and the benchmarks."""
    before = set(folder.glob("test-*"))
    command(["test", _config(folder, "test", evaluation_options(plan, folder, model))])
    (new,) = set(folder.glob("test-*")) - before
    return measured(new, [stage.name for stage in plan.stages], list(plan.held_out))


def _config(folder: Path, command: str, options: dict[str, Any]) -> str:
    """Write the options of a run beside its folder, where one can run it again by hand."""
    path = folder.with_name(f"{folder.name}.{command}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(options, indent=1, ensure_ascii=False) + "\n")  # JSON is YAML
    return f"--config={path}"


def remove_checkpoints(folder: Path) -> None:
    """Delete Lightning's checkpoints of a finished stage, and nothing else."""
    for path in [*folder.glob("checkpoints/*.ckpt"), *folder.glob("best/*.ckpt")]:
        if path.is_dir():  # of a strategy that shards
            shutil.rmtree(path)
        else:
            path.unlink()
