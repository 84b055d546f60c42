"""The policy's responses to the requests of benchmarks, and what they come to."""

from __future__ import annotations

from typing import Any, Protocol

from torch import distributed

from sdft_lightning.errors import UserError, printable
from sdft_lightning.forward.scoring import score_continuations
from sdft_lightning.models.tokenization import stop_ids
from sdft_lightning.rollout import Sampling, StopTexts, generate_rollout
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import (
    ContinuationScore,
    GenerationBatch,
    Measurement,
    RequestResponse,
    ScoringBatch,
    task_data,
)

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
        parallel = distributed.is_available() and distributed.is_initialized()
        if not parallel:
            return suite.metrics(mine) if mine else {}
        shared: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(shared, mine)
        responses = [response for part in shared for response in part]
        measured: list[Any] = [{}]
        if responses and distributed.get_rank() == 0:
            try:
                measured = [suite.metrics(responses)]
            except Exception as error:  # the other ranks wait for an answer
                measured = [f"{type(error).__name__}: {printable(str(error))}"]
        distributed.broadcast_object_list(measured, src=0)
        if isinstance(measured[0], str):
            raise UserError(f"data.benchmarks: {measured[0]}")
        found: dict[str, Measurement] = measured[0]
        return found


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
