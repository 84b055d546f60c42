"""Responses to the requests of benchmarks; what was measured before training, and against it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import distributed

from sdft_lightning.errors import UserError, printable
from sdft_lightning.files.run_folder import (
    ITEM_SCORES,
    ItemKey,
    MeasuredItems,
    read_items,
    run_folder,
)
from sdft_lightning.forward.scoring import score_continuations
from sdft_lightning.graders import Paired, paired_test
from sdft_lightning.models.tokenization import stop_ids
from sdft_lightning.rollout import Sampling, StopTexts, generate_rollout
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import (
    ContinuationScore,
    GenerationBatch,
    Items,
    Measurement,
    RequestResponse,
    ScoringBatch,
    task_data,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

# The harness's answers are drawn with one seed in all runs, so that two runs can be compared.
_ANSWER_SEED = 1234


class Suite(Protocol):
    """What a data module offers as `benchmark_suite`."""

    fingerprint: str
    every_n_validations: int

    def metrics(self, responses: list[RequestResponse]) -> dict[str, Measurement]:
        """What the benchmarks came to, by name."""
        ...


class CapabilityScores:
    """Collects the responses of one validation on this rank.

    Attributes:
        responses: Those since the last `take`.
    """

    def __init__(self) -> None:
        self.responses: list[RequestResponse] = []

    def respond(self, module: Any, batch: ScoringBatch | GenerationBatch) -> None:
        """Score or answer the requests of a batch with the module's student, in its precision."""
        if not batch.requests:
            return
        if isinstance(batch, ScoringBatch):
            scores = score_continuations(module.gather_student(), batch)
            self.responses += [
                RequestResponse(request, 0, score, None)
                for request, score in zip(batch.requests, scores, strict=True)
            ]
            return
        model = module.gather_student()
        # As the harness stops: where the model's own files say so.
        stops = stop_ids(module.tokenizer, getattr(model, "generation_config", None))
        texts = answer_requests(model, module.tokenizer, batch, stops)
        self.responses += [
            RequestResponse(request, copy, ContinuationScore(0.0, False), text)
            for request, copy, text in zip(batch.requests, batch.copies, texts, strict=True)
        ]

    def take(self, suite: Suite) -> dict[str, Measurement]:
        """The metrics of all ranks' responses since the last call, the same on every rank.

        Nothing where no rank has responded.
        """
        mine, self.responses = self.responses, []
        responses = of_all_ranks(mine)
        if not responses:
            return {}
        return on_rank_zero(lambda: suite.metrics(responses), "data.benchmarks")


def _is_parallel() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def of_all_ranks(mine: list[T]) -> list[T]:
    """What all ranks have, rank after rank; all of them must call it."""
    if not _is_parallel():
        return mine
    shared: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shared, mine)
    return [each for part in shared for each in part]


def on_rank_zero(compute: Callable[[], T], what: str) -> T:
    """What rank zero computes, handed to every rank; all of them must call it.

    Args:
        compute: Called on rank zero only.
        what: What an error is about, for the message.

    Raises:
        UserError: On every rank, if `compute` fails on one of several.
    """
    if not _is_parallel():
        return compute()
    found: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            found = [compute(), None]
        except Exception as error:  # the other ranks wait for an answer
            found = [None, f"{type(error).__name__}: {printable(str(error))}"]
    distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise UserError(f"{what}: {found[1]}")
    computed: T = found[0]
    return computed


class CapabilityTrack:
    """When benchmarks are measured in a run, and what they were before training.

    Attributes:
        due: Whether the validation that runs measures them.
        forced: Set to measure them in the next validation, whatever its number.
        measured_at: Optimizer step of the last measurement; None before the first.
        basis: What the baseline was measured on (`Suite.fingerprint`).
        baseline: Mean before the first step, for the retention; None where it was not measured.
    """

    def __init__(self) -> None:
        self.due = False
        self.forced = False
        self.measured_at: int | None = None
        self.baseline: float | None = None
        self.basis: str | None = None
        self._validations = 0

    def begin(self, trainer: Any) -> None:
        """Decide at the start of a validation: always outside of a fit; in a fit every n-th."""
        if trainer.sanity_checking:
            self.due = False
            return
        data = task_data(trainer)
        suite: Suite | None = None if data is None else data.benchmark_suite
        every = 1 if suite is None else suite.every_n_validations
        in_fit = trainer.state.fn == "fit"
        self.due = not in_fit or self.forced or self._validations % every == 0
        self.forced = False
        self._validations += in_fit

    def record(
        self, measured: dict[str, Measurement], trainer: Any, basis: str
    ) -> dict[str, float]:
        """Keep the baseline, and list what is logged: values, standard errors, retention."""
        if not measured:
            return {}
        self.measured_at = trainer.global_step
        values: dict[str, float] = {}
        for name, measurement in measured.items():
            values[name] = measurement.value
            if measurement.stderr is not None:
                values[f"{name}_stderr"] = measurement.stderr
        mean = values.get("mean")
        if mean is not None:
            if trainer.state.fn == "fit" and trainer.global_step == 0:
                self.baseline, self.basis = mean, basis
            if self.baseline and self.basis == basis:
                values["retention"] = mean / self.baseline
        return values

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"baseline": self.baseline, "basis": self.basis, "validations": self._validations}

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; one without benchmarks changes nothing."""
        if state is not None:
            self.baseline, self.basis = state["baseline"], state["basis"]
            self._validations = state["validations"]


class PairedTrack:
    """Compares each measurement item by item with an earlier one: the base.

    In a fit the base is what was measured before the first step; a resumed fit, and `validate` and
    `test`, read it from the run's folder.

    Args:
        compare_with: `Evaluation.compare_with`, which names another base.

    Attributes:
        tests: What the last measurement came to, by `<set>/<metric>`.
        base_name: The base, for people.
    """

    _OPTION = "model.evaluation.compare_with"

    def __init__(self, compare_with: str | None = None) -> None:
        self.compare_with = compare_with
        self.tests: dict[str, Paired] = {}
        self.base_name = ""
        self._base: dict[ItemKey, Items] | None = None  # on rank zero
        self._told: set[str] = set()

    def named_base(self) -> dict[ItemKey, Items]:
        """What `compare_with` names; nothing where it names nothing.

        Of several measurements of a set the first counts.

        Raises:
            UserError: If there is no such file, or it holds no scores of items.
        """
        if self.compare_with is None:
            return {}
        path = Path(self.compare_with).expanduser()
        path = path / ITEM_SCORES if path.is_dir() else path
        if not path.is_file():
            near = sorted(str(each) for each in path.parent.glob(f"*/{ITEM_SCORES}"))[:5]
            raise UserError(
                f"{self._OPTION}: there is no file {path}. Allowed is the folder of a run in which "
                f"something was measured, or a file {ITEM_SCORES} in it. Correct the path, or "
                f"leave it out{'; there are ' if near else ''}{', '.join(near)}."
            )
        found = read_items(path, self._OPTION)
        if not found:
            raise UserError(f"{self._OPTION}: {path} is empty: nothing was measured there yet.")
        return _first(found)

    def compare(
        self, measured: dict[ItemKey, Items], trainer: Any, in_fit: bool
    ) -> dict[str, float]:
        """Compare what was measured with the base; all ranks must call it together.

        Args:
            measured: The scores of all ranks' items.
            trainer: Of the run.
            in_fit: Whether the command is a fit.

        Returns:
            What is logged, by name: `<set>/<metric>/lost`, `gained` and `p`.
        """
        self.tests, self.base_name = on_rank_zero(
            lambda: self._compared(measured, trainer, in_fit), self._OPTION
        )
        return {
            f"{name}/{what}": float(getattr(test, what))
            for name, test in self.tests.items()
            for what in PAIRED_FIGURES
        }

    def _compared(
        self, measured: dict[ItemKey, Items], trainer: Any, in_fit: bool
    ) -> tuple[dict[str, Paired], str]:
        if not measured:
            return {}, ""
        before_training = in_fit and trainer.global_step == 0 and self.compare_with is None
        if before_training:
            self._base = {**(self._base or {}), **measured}
            self.base_name = "the model before the first step"
        elif self._base is None:
            self._base = self._read_base(trainer)
        found: dict[str, Paired] = {}
        absent: list[str] = []
        other: list[str] = []
        for key, now in measured.items():
            before = self._base.get(key)
            if before is None:
                absent.append(key.name)
            elif before.content != now.content or before.scores.keys() != now.scores.keys():
                other.append(key.name)
            elif (test := paired_test(before, now)) is not None:
                found[key.name] = test
        if not self._base:
            if not in_fit:  # a fit without benchmarks measures nothing before its first step
                self._tell("nothing was measured before the first step")
        elif absent or other:
            lines = [f"it lacks {_some(absent)}"] if absent else []
            self._tell("; ".join(lines + ([f"other items of {_some(other)}"] if other else [])))
        return found, self.base_name

    def _read_base(self, trainer: Any) -> dict[ItemKey, Items]:
        if self.compare_with is not None:
            self.base_name = self.compare_with
            return self.named_base()
        folder = run_folder(trainer)
        if re.fullmatch(r"(validate|test)-\d+", folder.name):  # of the command line
            folder = folder.parent
        path = folder / ITEM_SCORES
        known = read_items(path, "run.name") if path.is_file() else []
        self.base_name = f"the model before the first step, as in {path}"
        return _first([each for each in known if each.command == "fit" and each.step == 0])

    def _tell(self, why: str) -> None:
        """Say once what is not compared."""
        if why not in self._told:
            self._told.add(why)
            base = f" with {self.base_name}" if self._base else ""
            log.info(
                f"not compared item by item{base}: {why}. {self._OPTION} names what to compare "
                f"with: the folder of a run, or its {ITEM_SCORES}."
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return printable(", ".join(names[:3])) + more


PAIRED_FIGURES = ("lost", "gained", "p")


def _first(measured: list[MeasuredItems]) -> dict[ItemKey, Items]:
    """The first measurement of each set and metric."""
    return {each.key: each.items for each in reversed(measured)}


def answer_requests(
    model: Any, tokenizer: Any, batch: GenerationBatch, stop_ids: list[int]
) -> list[str]:
    """The answers to a batch of prompts, cut at the first stop text.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        batch: B prompts.
        stop_ids: Ids of which any ends an answer.

    Returns:
        B texts without special tokens.
    """
    settings = batch.settings
    stops = StopTexts(tokenizer, settings.stop)
    greedy = settings.temperature == 0.0
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=1.0 if greedy else settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
    )
    uniforms = None
    if not greedy:
        rows = [
            f"{request}/{copy}" for request, copy in zip(batch.requests, batch.copies, strict=True)
        ]
        uniforms = row_uniforms(_ANSWER_SEED, 0, rows, 1, settings.max_new_tokens)  # (B, T)
    rollout = generate_rollout(
        model,
        batch.prompts,
        sampling,
        uniforms,
        stop_ids,
        tokenizer.pad_token_id,
        stops,
    )
    return [
        stops.cut(tokenizer.decode(ids[mask], skip_special_tokens=True))
        for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    ]
