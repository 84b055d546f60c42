"""What a plan names: methods, stages, seeds, what is measured, how long each stage trains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sdft_lightning.errors import UserError, check_choice

Select = Literal["last", "best"]
Processes = Literal["own", "same"]

BASE = "base"  # the record of the model before the first stage; no method's name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Budget:
    """How long each stage trains, the same for all methods: give one of the two.

    Args:
        updates: Optimizer steps.
        tokens: Tokens of completions or demonstrations; a stage ends with the step that reaches it.
    """

    updates: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse none, both, and values below 1."""
        given = [value for value in (self.updates, self.tokens) if value is not None]
        if len(given) != 1 or given[0] < 1:
            raise UserError(
                f"budget: got updates {self.updates} and tokens {self.tokens}; give one of them, "
                "1 or more."
            )


@dataclass(frozen=True)
class Method:
    """A way to train: options of a run that stand over those of the plan and of the stage.

    Args:
        model: As the `model` of a fit: class_path and init_args.
        data: As its `data`, e.g. batch_size.
        trainer: As its `trainer`, e.g. accumulate_grad_batches.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A skill to learn.

    Args:
        name: Its name in folders and results.
        data: As the `data` of a fit: train, validation, test, grader, columns, prompts.
        budget: Its own budget instead of the plan's.
    """

    name: str
    data: Mapping[str, Any]
    budget: Budget | None = None


@dataclass(frozen=True)
class ContinualPlan:
    """Methods x stages x seeds, each stage trained from the model of the one before.

    Args:
        name: Name of the plan and of its folder.
        methods: Ways to train, by name.
        stages: Skills in the order in which they are learned.
        budget: How long each stage trains.
        root: Folder of all plans.
        seeds: One chain of stages for each method and seed.
        model: Options of all methods; those that concern evaluation are used for it, too.
        data: Options of all stages.
        trainer: Options of all runs.
        held_out: Graded sets of abilities to keep, as data.held_out of a fit.
        benchmarks: Tasks of lm-evaluation-harness, as data.benchmarks of a fit; measured before
            the first stage and after each.
        drift: Names in held_out on which KL from the base model is measured.
        select: Which model a stage hands on: last, or best on the validation questions.
        resume_every: Optimizer steps between two points that an interrupted fit resumes from.
        keep_checkpoints: Keep Lightning's checkpoints of finished stages; exported models stay
            in any case.
        processes: own runs each command in a process of its own (needed where a run has several);
            same runs all in this one, which saves a small plan the imports.
    """

    name: str
    methods: Mapping[str, Method]
    stages: list[Stage]
    budget: Budget
    root: str = "runs"
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44])
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    held_out: Mapping[str, Any] = field(default_factory=dict)
    benchmarks: Mapping[str, Any] = field(default_factory=dict)
    drift: list[str] = field(default_factory=list)
    select: Select = "last"
    resume_every: int = 10
    keep_checkpoints: bool = False
    processes: Processes = "own"

    def __post_init__(self) -> None:
        """Refuse what cannot be right, whatever the runs look like.

        Raises:
            UserError: Names the option and the remedy.
        """
        check_choice("select", self.select, get_args(Select))
        check_choice("processes", self.processes, get_args(Processes))
        self._check_names()
        if self.resume_every < 1:
            raise UserError(f"resume_every: got {self.resume_every}, allowed are 1 and more.")
        for name in self.drift:
            if name not in self.held_out:
                raise UserError(
                    f"drift: there is no set {name!r} in held_out, which has "
                    f"{', '.join(self.held_out) or 'none'}."
                )
        self._check_left_to_the_plan()
        if self.processes == "same" and self.trainer.get("devices") != 1:
            raise UserError(
                f"processes: same runs everything in one process, and trainer.devices is "
                f"{self.trainer.get('devices')!r}. Set trainer.devices to 1, or processes to own."
            )

    def _check_names(self) -> None:
        names = [stage.name for stage in self.stages]
        for option, found in (("methods", list(self.methods)), ("stages", names)):
            if not found:
                raise UserError(f"{option}: there are none. Name at least one.")
            for name in found:
                if not _NAME.fullmatch(name) or name == BASE:
                    raise UserError(
                        f"{option}: got the name {name!r}; names are letters, digits, _, . and -, "
                        f"and not {BASE!r}, which is the model before training."
                    )
        taken = [*names, *self.held_out]
        seeds = [str(seed) for seed in self.seeds]
        for option, values in (("stages and held_out", taken), ("seeds", seeds)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise UserError(f"{option}: {', '.join(twice)} stands twice. Each is named once.")
        if not self.seeds:
            raise UserError("seeds: there are none. Give at least one, e.g. [42].")

    def _check_left_to_the_plan(self) -> None:
        """Refuse options of a run that the plan itself sets."""
        remedies = {
            ("trainer", "max_steps"): "How long a stage trains is `budget`.",
            ("trainer", "max_epochs"): "How long a stage trains is `budget`.",
            ("data", "held_out"): "Held-out sets are the plan's own `held_out`.",
            ("data", "benchmarks"): "Benchmarks are the plan's own `benchmarks`.",
            ("data", "name"): "A stage's data has the name of the stage.",
        }
        parts: list[tuple[str, Any]] = [("", self)]
        parts += [(f"methods.{name}.", method) for name, method in self.methods.items()]
        parts += [(f"stages.{stage.name}.", stage) for stage in self.stages]
        for where, part in parts:
            for (section, key), remedy in remedies.items():
                if key in getattr(part, section, {}):
                    raise UserError(f"{where}{section}.{key}: {remedy} Take it out.")
            for callback in getattr(part, "trainer", {}).get("callbacks") or []:
                named = callback.get("class_path", "") if isinstance(callback, Mapping) else ""
                if str(named).endswith("DriftMonitor"):
                    raise UserError(
                        f"{where}trainer.callbacks: DriftMonitor would compare with the stage "
                        "before. Name its sets in the plan's `drift`, which compares with the base."
                    )

    def budget_of(self, stage: Stage) -> Budget:
        """How long a stage trains."""
        return stage.budget or self.budget
