"""The options of each run, as the command line takes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdft_lightning.continual.plan import ContinualPlan, Stage
from sdft_lightning.continual.units import Unit, plan_folder

# What of the model's options concerns evaluation, which is the same for all methods.
_EVALUATED = {
    "policy": ("weights_dtype", "attn_implementation", "sampling_dtype"),
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
