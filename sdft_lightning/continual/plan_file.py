"""Reads a plan from YAML files and options of the command line, to the options of each run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sdft_lightning.continual.plan import Budget, ContinualPlan, Method, Stage, Unit, plan_folder
from sdft_lightning.errors import UserError, printable, shown
from sdft_lightning.files.endpoints import check_no_secrets
from sdft_lightning.files.texts import check_yaml

# What of the model's options concerns evaluation, which is the same for all methods.
_EVALUATED = {
    "policy": ("weights_dtype", "attn_implementation", "sampling_dtype", "decoding"),
    "evaluation": ("max_new_tokens",),
}
_QUESTIONS = ("grader", "columns", "prompts", "lengths")  # of a stage's test set
_LOADING = ("eval_batch_size", "num_workers", "judge", "lengths", "prompts")
_MACHINE = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "plugins",
    "deterministic",
    "benchmark",
    "inference_mode",
    "enable_progress_bar",
    "enable_model_summary",
    "logger",
)
_ROOM = "sdft_lightning.continual"
_CALLBACKS = "sdft_lightning.callbacks"


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options, later ones over earlier; another class_path takes the whole place."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            before = result.get(key)
            if isinstance(before, Mapping) and isinstance(value, Mapping) and _alike(before, value):
                value = merged(before, value)
            result[key] = value
    return result


def _alike(before: Any, after: Any) -> bool:
    names = (before.get("class_path"), after.get("class_path"))
    return None in names or names[0] == names[1]


def base_model(plan: ContinualPlan) -> tuple[str, str | None]:
    """Name and revision of the model before training."""
    policy = plan.model.get("init_args", {}).get("policy") or {}
    return policy.get("name", "embedded"), policy.get("revision")


def stage_data(plan: ContinualPlan, stage: Stage) -> dict[str, Any]:
    """The data options of a stage, those of a method left out."""
    return merged(plan.data, stage.data)


def fit_options(plan: ContinualPlan, unit: Unit, model_name: str | None) -> dict[str, Any]:
    """The options of a stage's fit.

    Args:
        plan: The plan.
        unit: The stage of a chain.
        model_name: Folder of the model that the stage before handed on; None for the base model.
    """
    name, revision = (model_name, None) if model_name else base_model(plan)
    start = {"policy": {"name": name, "revision": revision}}
    budget = plan.budget_of(unit.stage)
    trainer = merged(plan.trainer, unit.options.trainer)
    length = {"max_steps": budget.updates or -1, "max_epochs": -1}
    callbacks = [*(trainer.get("callbacks") or []), *_fit_callbacks(plan, unit)]
    return {
        "seed_everything": unit.seed,
        "run": {"root": str(unit.chain), "name": unit.folder_name},
        "model": merged(plan.model, unit.options.model, {"init_args": start}),
        "data": {
            **merged(stage_data(plan, unit.stage), unit.options.data),
            "name": unit.stage.name,
            "held_out": dict(plan.held_out),
        },
        "trainer": {**trainer, **length, "callbacks": callbacks},
        # The plan's own callbacks write what a fit resumes from, and the best model.
        "checkpoint": {"save_top_k": 0, "save_last": False},
    }


def _fit_callbacks(plan: ContinualPlan, unit: Unit) -> list[dict[str, Any]]:
    tokens = plan.budget_of(unit.stage).tokens
    found = [
        *_drift(plan),
        {"class_path": f"{_CALLBACKS}.TokenBudget", "init_args": {"tokens": tokens}},
        {"class_path": f"{_ROOM}.StageEnd"},
    ]
    if plan.select == "best":
        # Two are kept: the best one that the newest resume point knows is never the one removed.
        best = {
            "dirpath": str(unit.folder / "best"),
            "filename": "step-{step}",
            "auto_insert_metric_name": False,
            "monitor": f"val/task/{unit.stage.name}/accuracy",
            "mode": "max",
            "save_top_k": 2,
            "save_weights_only": True,
            "save_on_train_epoch_end": False,
            "enable_version_counter": False,
        }
        path = "lightning.pytorch.callbacks.ModelCheckpoint"
        found.append({"class_path": path, "init_args": best})
    # After the best one: a resume point holds what that callback knows of its step.
    every = {"every_n_steps": plan.resume_every}
    return [*found, {"class_path": f"{_ROOM}.ResumePoint", "init_args": every}]


def _drift(plan: ContinualPlan) -> list[dict[str, Any]]:
    if not plan.drift:
        return []
    name, revision = base_model(plan)
    init_args = {"held_out": list(plan.drift), "model_name": name, "revision": revision}
    return [{"class_path": f"{_CALLBACKS}.DriftMonitor", "init_args": init_args}]


def evaluation_options(plan: ContinualPlan, run: Path, model_name: str | None) -> dict[str, Any]:
    """The options of a `test` of every stage's test set, the held-out sets and the benchmarks.

    Args:
        plan: The plan.
        run: Folder of the run that the model belongs to.
        model_name: Folder of the exported model; None for the base model.
    """
    name, revision = (model_name, None) if model_name else base_model(plan)
    given = plan.model.get("init_args", {})
    model = {
        part: {key: given[part][key] for key in keys if key in given[part]}
        for part, keys in _EVALUATED.items()
        if part in given
    }
    questions = {stage.name: _test_set(plan, stage) for stage in plan.stages}
    data = {key: plan.data[key] for key in _LOADING if key in plan.data}
    return {
        "seed_everything": 42,  # answers are greedy; nothing depends on it
        "run": {"root": str(run.parent), "name": run.name},
        "model": {
            "class_path": "sdft_lightning.modules.PolicyModule",
            "init_args": merged(model, {"policy": {"name": name, "revision": revision}}),
        },
        "data": {
            **data,
            "name": "(none)",
            "held_out": {**questions, **plan.held_out},
            **({"benchmarks": dict(plan.benchmarks)} if plan.benchmarks else {}),
        },
        "trainer": {
            **{key: plan.trainer[key] for key in _MACHINE if key in plan.trainer},
            "callbacks": [*_drift(plan), {"class_path": f"{_CALLBACKS}.ItemScores"}],
        },
    }


def _test_set(plan: ContinualPlan, stage: Stage) -> dict[str, Any]:
    data = stage_data(plan, stage)
    return {"source": data.get("test"), **{key: data[key] for key in _QUESTIONS if key in data}}


def base_folder(plan: ContinualPlan) -> Path:
    """Folder of the model's evaluation before training."""
    return plan_folder(plan) / "base"


# Not jsonargparse: it looks for classes in every `class_path` below a plan's methods, which
# belong to the runs, are parsed by the runs' own command, and there by short name, too.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "methods": Mapping,
    "stages": list,
    "budget": (Mapping, type(None)),
    "root": str,
    "seeds": list,
    "model": Mapping,
    "data": Mapping,
    "trainer": Mapping,
    "held_out": Mapping,
    "benchmarks": Mapping,
    "drift": list,
    "select": str,
    "resume_every": int,
    "keep_checkpoints": bool,
    "processes": str,
    "updates": (int, type(None)),
    "tokens": (int, type(None)),
}
_SHOWN: dict[type, str] = {
    Mapping: "named options",
    list: "a list",
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    type(None): "nothing",
}


def read_options(configs: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """The options of YAML files, later ones over earlier, and of `--a.b=value` over all.

    Raises:
        UserError: If a file or an option cannot be read.
    """
    options: dict[str, Any] = {}
    for config in configs:
        options = merged(options, _read(Path(config)))
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        if not override.startswith("--") or not equals:
            raise UserError(
                f"{override}: not understood. Options of the plan are given as --name=value, e.g. "
                "--budget.updates=8; the command's own are --config, --dry_run and --shard."
            )
        value = _yaml(text, override)
        for part in reversed(name.split(".")):
            value = {part: value}
        options = merged(options, _of_stages(value, options))
    return options


def _of_stages(given: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """An option of one stage, which is named, as the whole list of stages; others as they are."""
    named, stages = given.get("stages"), options.get("stages")
    if not isinstance(named, Mapping) or not isinstance(stages, list):
        return given
    (name,) = named
    known = [stage.get("name") if isinstance(stage, Mapping) else None for stage in stages]
    if name not in known or not isinstance(named[name], Mapping):
        raise UserError(
            f"stages.{name}: there is no such stage. Give --stages.<name>.<option>=value; the "
            f"stages are {', '.join(str(each) for each in known)}."
        )
    place = known.index(name)
    return {"stages": [*stages[:place], merged(stages[place], named[name]), *stages[place + 1 :]]}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"config: there is no file {path} (looked in {Path.cwd()}).")
    found = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(found, dict):
        raise UserError(f"config: {path} must hold named options, got {type(found).__name__}.")
    return found


def _yaml(text: str, where: str) -> Any:
    check_yaml(text, where)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: malformed YAML: {printable(str(error))}") from error


def build_plan(options: Mapping[str, Any]) -> ContinualPlan:
    """The plan that options describe.

    Raises:
        UserError: If an option is unknown, missing or of the wrong type.
    """
    check_no_secrets(options)
    given = _fields(ContinualPlan, options, "")
    given["methods"] = {
        name: Method(**_fields(Method, method, f"methods.{name}."))
        for name, method in given["methods"].items()
    }
    given["stages"] = [
        _stage(stage, f"stages[{place}].") for place, stage in enumerate(given["stages"])
    ]
    given["budget"] = Budget(**_fields(Budget, given["budget"], "budget."))
    if given.get("held_out"):
        from sdft_lightning.data.sets import HeldOut

        for name, held in given["held_out"].items():
            _known(HeldOut, held, f"held_out.{name}.")  # jsonargparse drops unknown ones silently
    for seed in given.get("seeds", []):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UserError(f"seeds: got {shown(seed)}; seeds are whole numbers.")
    return ContinualPlan(**given)


def _stage(options: Any, where: str) -> Stage:
    given = _fields(Stage, options, where)
    if given.get("budget") is not None:
        given["budget"] = Budget(**_fields(Budget, given["budget"], f"{where}budget."))
    return Stage(**given)


def _known(kind: type, options: Any, where: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass, once it is clear that all options are among them."""
    if not isinstance(options, Mapping):
        raise UserError(f"{where[:-1]}: got {shown(options)}; give named options.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in options:
        if name not in fields:
            raise UserError(
                f"{where}{name}: there is no such option. Allowed are {', '.join(fields)}."
            )
    return fields


def _fields(kind: type, options: Any, where: str) -> dict[str, Any]:
    """Options by the names of a dataclass's fields, of the right types, none missing."""
    fields = _known(kind, options, where)
    for name, value in options.items():
        allowed = _TYPES[name]
        is_number = allowed is int or allowed == _TYPES["updates"]
        if not isinstance(value, allowed) or (is_number and isinstance(value, bool)):
            kinds = allowed if isinstance(allowed, tuple) else (allowed,)
            names = " or ".join(_SHOWN.get(each, each.__name__) for each in kinds)
            raise UserError(f"{where}{name}: got {shown(value)}; it must be {names}.")
    for name, field in fields.items():
        absent = field.default is field.default_factory is dataclasses.MISSING
        if absent and name not in options:
            raise UserError(f"{where}{name}: it is needed and not given.")
    return dict(options)
