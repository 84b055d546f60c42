"""What is known before the first run starts: whose the folder is, and what cannot work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdft_lightning.continual.plan import ContinualPlan, chains_of, plan_folder
from sdft_lightning.continual.plan_file import evaluation_options, fit_options, stage_data
from sdft_lightning.data.sources import EXAMPLE_PREFIX, HUB_PREFIX, example_path
from sdft_lightning.errors import UserError, shown
from sdft_lightning.files.whole_files import check_can_make, held_lock, write_whole

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
    if isinstance(source, Mapping) or str(source).startswith(HUB_PREFIX):
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


# (command, its options as JSON) -> what is wrong with them, or nothing.
Parse = Callable[[str, str], str]


def check_plan(plan: ContinualPlan, parse: Parse) -> None:
    """Refuse a plan of which any run would be refused for its options, hours from now.

    Args:
        plan: The plan.
        parse: Parses the options of a command as the command itself does.

    Raises:
        UserError: Names the stage, the method and the option.
    """
    _check_stages(plan)
    for option, source in sources_of(plan):
        local_path(source, option)
    for chain in chains_of(plan)[: len(plan.methods)]:  # seeds differ in a number only
        for unit in chain:
            options = fit_options(plan, unit, None if unit.number == 1 else "the stage before")
            where = f"methods.{unit.method}, stages.{unit.stage.name}"
            _check_handed_on(where, options["model"])
            _check_best_is_whole(where, plan.select, options["trainer"].get("strategy"))
            if plan.budget_of(unit.stage).tokens is not None:
                _check_schedule(where, options["model"])
            _check(where, parse("fit", json.dumps(options)))
    evaluation = evaluation_options(plan, plan_folder(plan) / "base", None)
    _check("the evaluation of all stages", parse("test", json.dumps(evaluation)))


def _check(where: str, problem: str) -> None:
    if problem:
        raise UserError(f"{where}: {problem}")


def _check_stages(plan: ContinualPlan) -> None:
    needed = ["train", "test", "grader"] + (["validation"] if plan.select == "best" else [])
    for stage in plan.stages:
        data = stage_data(plan, stage)
        for name in needed:
            if data.get(name) is None:
                why = "to choose the best model by" if name == "validation" else "in every stage"
                raise UserError(
                    f"stages.{stage.name}.data.{name}: it is needed {why} and not given. Set it in "
                    f"the stage or in the plan's own data. {data.get('obtain') or ''}".rstrip()
                )


def _check_schedule(where: str, model: Mapping[str, Any]) -> None:
    """A budget of tokens does not know its number of steps, and other schedules need it."""
    schedule = model.get("init_args", {}).get("schedule") or {}
    if schedule.get("name") != "constant" or schedule.get("warmup_ratio") is not None:
        raise UserError(
            f"{where}: budget.tokens leaves the number of steps open, and the learning rate is "
            f"scheduled over it: got model.init_args.schedule {dict(schedule)}. Set it to "
            "{name: constant}, with warmup_steps if you like, or give budget.updates."
        )


def _check_best_is_whole(where: str, select: str, strategy: Any) -> None:
    """The best weights are put into whole models only."""
    name = strategy.get("class_path", "") if isinstance(strategy, Mapping) else str(strategy or "")
    if select == "best" and (
        name == "fsdp2" or name.endswith(("FSDP2Strategy", "ParallelStrategy"))
    ):
        raise UserError(
            f"{where}: trainer.strategy: {name} spreads the model over processes, and select: best "
            "puts the best weights into a whole one. Set select: last, or another strategy."
        )


def _check_handed_on(where: str, model: Mapping[str, Any]) -> None:
    """A stage hands on a whole model, which adapters on 4-bit weights do not come to."""
    policy = model.get("init_args", {}).get("policy") or {}
    quantization = policy.get("quantization")
    if quantization is not None:
        raise UserError(
            f"{where}: model.init_args.policy.quantization: got {quantization}, allowed is none: a "
            "stage hands on a whole model, and adapters cannot be added to 4-bit weights. Take it "
            "out; policy.weights_dtype: bfloat16 saves memory below adapters, too."
        )
