"""The plan as a table: every run, what is done, and how long the rest may take.

Where none is finished, that is from model, rows and this machine's speed: a guess within a factor
of two or three, for the decision whether to wait, go to lunch, or go home: floating-point
operations (2 a parameter and token forward, 6 with the backward pass) over the speed of a matrix
product, and sampling as reading all weights once a token.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

import torch

from sdft_lightning import modules
from sdft_lightning.callbacks.terminal import format_seconds
from sdft_lightning.continual.plan import (
    BASE,
    Budget,
    ContinualPlan,
    Shard,
    Unit,
    chains_of,
    plan_folder,
    share_of,
)
from sdft_lightning.continual.plan_file import base_model, merged, stage_data
from sdft_lightning.continual.records import Key
from sdft_lightning.data import DemonstrationDataModule
from sdft_lightning.data.rows import Columns, compose, wanted_columns
from sdft_lightning.data.sources import read_rows
from sdft_lightning.models.tokenization import resolve_model
from sdft_lightning.modules.evaluation import Evaluation
from sdft_lightning.rollout import Sampling

_CHARACTERS_A_TOKEN = 4
_TEMPLATE_TOKENS = 20
_MEASURED_SECONDS = 0.2
_BYTES_A_WEIGHT = 4
# Whatever odd options do to a guess, it ends no plan: the run itself says what is wrong with them.
_UNKNOWN = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)


class Machine(NamedTuple):
    """What a device does in a second.

    Attributes:
        operations: Floating-point operations of a product of large matrices.
        bytes_read: Bytes of a matrix that is multiplied by a vector.
    """

    operations: float
    bytes_read: float


class SetSize(NamedTuple):
    """Rows of a set, and tokens of an average one.

    Attributes:
        rows: How many.
        prompt: Tokens of the question with its template.
        demonstration: Tokens of the answer.
        context: Tokens of the source text.
    """

    rows: int
    prompt: float
    demonstration: float
    context: float


class RoughTime:
    """Guesses the seconds of a plan's runs; each part is looked at when it is first needed.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: ContinualPlan) -> None:
        self.plan = plan
        self._sizes: dict[str, SetSize] = {}

    def seconds(self, unit: Unit | None) -> float | None:
        """Of a stage with its evaluation, or of the base model's evaluation without one.

        None where the model or the rows cannot be looked at (a Hub that is not reached, say).
        """
        try:
            evaluation = self._evaluation()
            return evaluation if unit is None else self._fit(unit) + evaluation
        except _UNKNOWN:
            return None

    @cached_property
    def machine(self) -> Machine:
        """The speed of the device that the plan trains on, measured in half a second."""
        wanted = str(self.plan.trainer.get("accelerator", "auto"))
        on_gpu = wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return measure_machine(torch.device("cuda" if on_gpu else "cpu"))

    @cached_property
    def parameters(self) -> int:
        """Weights of the model, counted without loading any."""
        from transformers import AutoConfig, AutoModelForCausalLM

        name, revision = base_model(self.plan)
        config = AutoConfig.from_pretrained(resolve_model(name), revision=revision)
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(config).num_parameters())

    def _size(self, source: Any, columns: Mapping[str, Any]) -> SetSize:
        key = repr((source, sorted(columns.items())))
        if key not in self._sizes:
            names = Columns(**columns)
            rows = compose(read_rows(source, "data", wanted_columns(names)), names).rows

            def tokens(column: str | None) -> float:
                texts = [str(row.get(column or "") or "") for row in rows]
                return fmean(map(len, texts)) / _CHARACTERS_A_TOKEN

            prompt = tokens(names.prompt) + _TEMPLATE_TOKENS
            self._sizes[key] = SetSize(
                len(rows), prompt, tokens(names.demonstration), tokens(names.context)
            )
        return self._sizes[key]

    def _forward(self, tokens: float) -> float:
        return 2 * self.parameters * tokens / self.machine.operations

    def _sampled(self, rows: float, new_tokens: int) -> float:
        reading = _BYTES_A_WEIGHT * self.parameters / self.machine.bytes_read
        return new_tokens * max(reading, self._forward(rows))

    def _answers(self, size: SetSize, data: Mapping[str, Any]) -> float:
        """Seconds to answer all questions of a set."""
        batch = min(size.rows, _option(DemonstrationDataModule, "eval_batch_size", data))
        new = _option(Evaluation, "max_new_tokens", _init(self.plan.model).get("evaluation") or {})
        batches = math.ceil(size.rows / batch)
        return self._forward(size.rows * size.prompt) + batches * self._sampled(batch, new)

    def _evaluation(self) -> float:
        total = 0.0
        for stage in self.plan.stages:
            data = stage_data(self.plan, stage)
            total += self._answers(self._size(data["test"], data.get("columns", {})), data)
        return total + self._kept()

    def _kept(self) -> float:
        """The held-out sets; those of the drift are read once more."""
        total = 0.0
        for name, held in self.plan.held_out.items():
            columns = held.get("columns", {"reference": "reference"})
            size = self._size(held["source"], columns)
            total += self._answers(size, self.plan.data)
            if name in self.plan.drift:
                total += 2 * self._forward(size.rows * size.prompt)
        return total

    def _fit(self, unit: Unit) -> float:
        model = merged(self.plan.model, unit.options.model)
        data = merged(stage_data(self.plan, unit.stage), unit.options.data)
        trainer = merged(self.plan.trainer, unit.options.trainer)
        size = self._size(data["train"], data.get("columns", {}))
        window = int(trainer.get("accumulate_grad_batches") or 1)
        rows = _option(DemonstrationDataModule, "batch_size", data) * window
        step, trained = self._step(model, size, rows)
        budget = self.plan.budget_of(unit.stage)
        updates = budget.updates or math.ceil((budget.tokens or 0) / max(1.0, trained))
        total = updates * step
        interval = trainer.get("val_check_interval")
        if data.get("validation") is not None and isinstance(interval, int):
            each = self._answers(self._size(data["validation"], data.get("columns", {})), data)
            total += updates * window // interval * (each + self._kept())
        return total

    def _step(self, model: Mapping[str, Any], size: SetSize, rows: int) -> tuple[float, float]:
        """Seconds of an optimizer step, and tokens that it trains on."""
        method = getattr(modules, str(model.get("class_path", "")).rpartition(".")[2], None)
        if not (isinstance(method, type) and issubclass(method, modules.SDFTModule)):
            tokens = rows * size.demonstration
            return 3 * self._forward(rows * (size.prompt + size.demonstration)), tokens
        sampling = _init(model).get("sampling") or {}
        new = int(sampling.get("max_new_tokens", Sampling().max_new_tokens))
        rows *= int(sampling.get("completions_per_prompt", 1))
        shown = size.prompt + size.demonstration + size.context
        seconds = self._forward(rows * size.prompt) + self._sampled(rows, new)
        seconds += 3 * self._forward(rows * (size.prompt + new))  # student
        return seconds + self._forward(rows * (shown + new)), rows * new


def measure_machine(device: torch.device) -> Machine:
    """How fast a device multiplies, for a moment.

    Args:
        device: A CPU or a GPU.
    """
    square = torch.randn(1024, 1024, device=device)
    long = torch.randn(4096, 4096, device=device)
    one = torch.randn(1, 4096, device=device)
    products = _per_second(lambda: square @ square, device)
    reads = _per_second(lambda: one @ long, device)
    return Machine(products * 2 * 1024**3, reads * long.numel() * long.element_size())


def _per_second(call: Any, device: torch.device) -> float:
    call()
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _MEASURED_SECONDS:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
    return count / passed


def _init(model: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = model.get("init_args") or {}
    return found


def _option(owner: Any, name: str, given: Mapping[str, Any]) -> int:
    """An option as it is given, or its default."""
    value = given.get(name)
    return int(inspect.signature(owner).parameters[name].default if value is None else value)


Records = Mapping[Key, Mapping[str, Any]]
Guess = Callable[[Unit | None], float | None]


def overview(
    plan: ContinualPlan, shard: Shard, records: Records, guess: Guess | None = None
) -> str:
    """All runs of a share with their state, and the time that is left.

    Args:
        plan: The plan.
        shard: The share.
        records: The newest record of each run.
        guess: Seconds of a run of whose method none is finished; `RoughTime` without it.
    """
    guess = guess or RoughTime(plan).seconds
    base: list[list[Unit | None]] = [[None]] if shard.number == 1 else []
    chains = base + [[*chain] for chain in share_of(chains_of(plan), shard)]
    rows = [("run", "trains", "state", "seconds")]
    measured: list[float] = []
    guessed: list[float | None] = []
    for unit in (unit for chain in chains for unit in chain):
        record = records.get((BASE, None, 0) if unit is None else unit.key)
        if record is not None and record["status"] == "finished":
            state, seconds = "done", f"{_seconds(record):.0f}"
        else:
            state = "to do" if record is None else "failed, to do again"
            known = estimate(plan, unit, records)
            if known is not None:
                measured.append(known)
                seconds = f"about {known:.0f}"
            else:
                guessed.append(guess(unit))
                seconds = "" if guessed[-1] is None else f"roughly {guessed[-1]:.0f}"
        length = "nothing" if unit is None else _length(plan.budget_of(unit.stage))
        rows.append((BASE if unit is None else unit.run, length, state, seconds))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([f"{plan_folder(plan)}:", *lines, _time_left(measured, guessed)])


def _length(budget: Budget) -> str:
    if budget.updates is not None:
        return f"{budget.updates} updates"
    return f"{budget.tokens} tokens"


def _seconds(record: Mapping[str, Any]) -> float:
    return float(sum(record["seconds"].values()))


def estimate(plan: ContinualPlan, unit: Unit | None, records: Records) -> float | None:
    """Seconds of a run, from finished runs of the same method; None where there is none.

    Training is taken to grow with updates (or tokens), evaluation to be as long as it was.
    """
    method = BASE if unit is None else unit.method
    done = [
        record
        for (name, _, _), record in records.items()
        if name == method and record["status"] == "finished"
    ]
    if unit is None or not done:
        return None
    budget = plan.budget_of(unit.stage)
    what, amount = ("updates", budget.updates) if budget.updates else ("tokens", budget.tokens)
    trained: int = sum(record[what] for record in done)
    fit: float = sum(record["seconds"]["fit"] for record in done)
    evaluation: float = sum(record["seconds"]["evaluate"] for record in done)
    return fit / max(trained, 1) * (amount or 0) + evaluation / len(done)


def _time_left(measured: list[float], guessed: list[float | None]) -> str:
    """The sums of what is known and of what is guessed, and how many runs nothing tells of."""
    rough = [seconds for seconds in guessed if seconds is not None]
    unknown = len(guessed) - len(rough)
    if not measured and not guessed:
        return "All is done."
    parts = [f"{len(measured) + len(guessed)} runs to do"]
    if measured:
        took = format_seconds(sum(measured))
        parts.append(f"{len(measured)} of them about {took} (as their method took)")
    if rough:
        parts.append(
            f"{len(rough)} roughly {format_seconds(sum(rough))} (within a factor of three, from "
            "the model's size, the rows and a matrix product on this machine)"
        )
    if unknown:
        parts.append(f"{unknown} of which nothing is known, as their model or rows are not here")
    return "; ".join(parts) + "."
