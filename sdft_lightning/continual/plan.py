"""What a plan names, and the runs that it comes to: chains of stages with folders and shares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.files.run_folder import named_folder

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


class Unit(NamedTuple):
    """One stage of one chain.

    Attributes:
        method: Name of the method.
        seed: Seed of the chain.
        number: Place of the stage, from 1.
        stage: The stage.
        options: The method's options.
        chain: Folder of the chain, `<root>/<name>/<method>/seed<k>`.
    """

    method: str
    seed: int
    number: int
    stage: Stage
    options: Method
    chain: Path

    @property
    def folder_name(self) -> str:
        """Name of the run in its chain's folder."""
        return f"{self.number}_{self.stage.name}"

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.chain / self.folder_name

    @property
    def run(self) -> str:
        """The run below the plan's folder, as results name it."""
        return f"{self.method}/seed{self.seed}/{self.folder_name}"

    @property
    def key(self) -> tuple[str, int | None, int]:
        """What tells a record from others."""
        return self.method, self.seed, self.number


class Shard(NamedTuple):
    """A share of the chains.

    Attributes:
        number: Which share, from 1.
        of: Of how many.
    """

    number: int = 1
    of: int = 1

    @property
    def results_name(self) -> str:
        """Name of the file that this share's records go to."""
        if self.of == 1:
            return "results.jsonl"
        return f"results-shard{self.number}of{self.of}.jsonl"


def parse_shard(text: str | None) -> Shard:
    """Read `2/8`.

    Raises:
        UserError: If it is no such share.
    """
    if text is None:
        return Shard()
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    shard = Shard(int(found[1]), int(found[2])) if found else None
    if shard is None or not 1 <= shard.number <= shard.of:
        raise UserError(
            f"shard: got {text!r}; give i/n with 1 <= i <= n, e.g. 2/8 for the second of eight."
        )
    return shard


def plan_folder(plan: ContinualPlan) -> Path:
    """Where everything of a plan is written.

    Raises:
        UserError: If its name would lead out of its root.
    """
    return named_folder(plan.root, plan.name, "name", "root")


def chains_of(plan: ContinualPlan) -> list[list[Unit]]:
    """All chains, the first seed of every method first, so that early results can be compared."""
    return [
        [
            Unit(name, seed, number, stage, method, plan_folder(plan) / name / f"seed{seed}")
            for number, stage in enumerate(plan.stages, start=1)
        ]
        for seed in plan.seeds
        for name, method in plan.methods.items()
    ]


def share_of(chains: list[list[Unit]], shard: Shard) -> list[list[Unit]]:
    """Every n-th chain."""
    return chains[shard.number - 1 :: shard.of]
