"""What can be known of all runs before the first one starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from sdft_lightning.continual.identity import local_path, sources_of
from sdft_lightning.continual.options import evaluation_options, fit_options, stage_data
from sdft_lightning.continual.plan import ContinualPlan
from sdft_lightning.continual.units import chains_of, plan_folder
from sdft_lightning.errors import UserError

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
