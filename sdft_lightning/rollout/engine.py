"""Who samples the student's completions in training: an engine, chosen in the config.

What an engine outside the trainer has sampled is checked when it arrives (`as_rollout`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.errors import UserError, shown
from sdft_lightning.rollout.generate import RolloutRequest, join_requests, split_rollout
from sdft_lightning.rollout.sampling import Sampling
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.types import Rollout


class Engine(ABC):
    """Samples completions from the student's present weights.

    Attributes:
        is_trainer: Whether it is the trained model itself that samples.
        truncates_log_probs: Whether `sampled_log_probs` are those after top-k, top-p and min-p, and
            not before.
        takes_shards: Whether it samples from a model that is spread over processes (fsdp2).
        device_share: Part of the device's memory that it reserves beside the trainer.
    """

    is_trainer: ClassVar[bool] = False
    truncates_log_probs: ClassVar[bool] = False
    takes_shards: ClassVar[bool] = True
    device_share: float = 0.0

    def check(self, sampling: Sampling, quantized: bool) -> None:  # noqa: B027 - most need none
        """Refuse, before a model is loaded, what the engine cannot do.

        Args:
            sampling: How completions will be sampled.
            quantized: Whether the student's frozen weights are kept in 4 bits.

        Raises:
            UserError: Names the option and the remedy.
        """

    def sample(self, student: StudentPasses, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """Sample the completions of several micro-batches at once; a rollout for each.

        Args:
            student: The passes of the trained model; `student.model` is the model itself.
            requests: Alike but for their rows and the length of their completions.
        """
        return split_rollout(self.generate(student, join_requests(requests)), requests)

    @abstractmethod
    def generate(self, student: StudentPasses, request: RolloutRequest) -> Rollout:
        """Sample completions.

        Args:
            student: The passes of the trained model; `student.model` is the model itself.
            request: What is to be sampled.

        Returns:
            The rollout, as long as its longest completion.
        """

    def forget(self) -> None:  # noqa: B027 - most need none
        """The weights may have changed from outside: take them anew, whatever the step."""

    def close(self) -> None:  # noqa: B027 - most need none
        """Give back what the engine holds; it may be used again."""


class TransformersEngine(Engine):
    """The trained model samples by itself; each token is the inverse CDF of its row's number."""

    is_trainer: ClassVar[bool] = True

    def sample(self, student: StudentPasses, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """The student's own completions, see `StudentPasses.sample`."""
        return student.sample(requests)

    def generate(self, student: StudentPasses, request: RolloutRequest) -> Rollout:
        """The student's own completions."""
        (rollout,) = student.sample([request])
        return rollout


def whole_weights_wanted() -> UserError:
    """What is said of an engine that does not take shards, such as a vLLM in one process."""
    return UserError(
        "model.engine: under fsdp2 no process has the whole weights that this engine wants. Use a "
        "vLLM server (VLLMServerEngine), --trainer.strategy=ddp or "
        "--model.engine=TransformersEngine."
    )


def check_one_truncation(sampling: Sampling, engine: str) -> None:
    """Refuse several truncations for engines that apply one after the other.

    Raises:
        UserError: Names them.
    """
    used = [
        name
        for name, unused in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
        if getattr(sampling, name) != unused
    ]
    if len(used) > 1:
        raise UserError(
            f"model.sampling: {engine} applies {' and '.join(used)} one after the other, the "
            "trainer each to the whole distribution, so that their log-probabilities could not be "
            "compared. Give one of them, or use the TransformersEngine."
        )


_REMEDY = (
    "Nothing of it was trained on. Use vLLM, version 0.32 or newer, with the model that is trained "
    "(see the documentation's page on vLLM), and look into its log."
)
# Log-probabilities of sampled tokens: rounding may lift one above 0, and vLLM writes -9999 for the
# logarithm of 0, which no sampled token has.
_LARGEST, _SMALLEST = 1e-3, -1000.0


class Sampled(NamedTuple):
    """One completion as an engine returns it; `as_rollout` checks what is in it.

    Attributes:
        token_ids: With its stop token, if there is one.
        log_probs: Of each token, after temperature and truncation.
        finished: Whether it ended by itself and was not cut off.
    """

    token_ids: Sequence[int]
    log_probs: Sequence[float]
    finished: bool


def vocabulary_size(student: Any) -> int:
    """How many token ids the student can embed and predict."""
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    sizes = [getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]]
    if head is not None:
        sizes.append(getattr(head, "out_features", None) or head.weight.shape[0])
    return int(min(sizes))


def as_rollout(
    rows: Sequence[Sampled], request: RolloutRequest, vocabulary: int, source: str
) -> Rollout:
    """Completions as padded tensors.

    Args:
        rows: One for each of the R completions.
        request: What was asked for.
        vocabulary: Token ids are below it.
        source: Who sampled, for the message.

    Raises:
        UserError: If they are not what was asked for.
    """
    wanted = len(request.row_ids) * request.sampling.completions_per_prompt
    if len(rows) != wanted:
        raise UserError(
            f"model.engine: {source} sent {len(rows)} completions, asked for were {wanted}. "
            f"{_REMEDY}"
        )
    for row, most in zip(rows, request.limits, strict=True):
        _check(row, most, request, vocabulary, source)
    length = max(len(row.token_ids) for row in rows)
    ids = torch.full((len(rows), length), request.pad_id)  # (R, T)
    log_probs = torch.zeros(len(rows), length)  # (R, T)
    for place, row in enumerate(rows):
        ids[place, : len(row.token_ids)] = torch.tensor([int(token) for token in row.token_ids])
        log_probs[place, : len(row.token_ids)] = torch.tensor([float(x) for x in row.log_probs])
    counts = torch.tensor([len(row.token_ids) for row in rows])  # (R,)
    mask = torch.arange(length) < counts.unsqueeze(1)  # (R, T)
    # A stop token as the last that was allowed may be called cut off, and is whole.
    truncated = torch.tensor([row.token_ids[-1] not in request.stop_ids for row in rows])  # (R,)
    device = request.prompts.ids.device
    parts: list[Tensor] = [part.to(device) for part in (ids, mask, log_probs, truncated)]
    return Rollout(*parts)


def _check(row: Sampled, most: int, request: RolloutRequest, vocabulary: int, source: str) -> None:
    problem = _tokens_problem(row.token_ids, most, request, vocabulary) or _log_probs_problem(row)
    if problem:
        raise UserError(f"model.engine: {source} sent {problem}. {_REMEDY}")
    if row.finished and row.token_ids[-1] not in request.stop_ids:
        raise UserError(
            f"model.engine: {source} ended a completion at token {row.token_ids[-1]}, which does "
            f"not end the student's (those that do: {request.stop_ids}). Start the server with "
            "--generation-config vllm, so that it adds no stop tokens of its own."
        )


def _tokens_problem(ids: Sequence[Any], most: int, request: RolloutRequest, vocabulary: int) -> str:
    """What is wrong with the tokens of a completion, or nothing."""
    if not ids:
        return "an empty completion"
    if len(ids) > most:
        return f"a completion of {len(ids)} tokens, where at most {most} were asked for"
    for place, token in enumerate(ids, start=1):
        if not isinstance(token, Integral) or isinstance(token, bool):
            return f"{shown(token)} as token {place} of a completion, where ids are whole"
        if not 0 <= int(token) < vocabulary:
            return (
                f"the token id {shown(int(token))}, outside the vocabulary of the "
                f"student (0 to {vocabulary - 1})"
            )
    ended = [place for place, token in enumerate(ids, start=1) if token in request.stop_ids]
    if ended and ended[0] < len(ids):
        return (
            f"{len(ids) - ended[0]} tokens behind the stop token {ids[ended[0] - 1]} of a "
            "completion"
        )
    return ""


def _log_probs_problem(row: Sampled) -> str:
    """What is wrong with the log-probabilities of a completion, or nothing."""
    if len(row.log_probs) != len(row.token_ids):
        return f"{len(row.log_probs)} log-probabilities for {len(row.token_ids)} tokens"
    for place, value in enumerate(row.log_probs, start=1):
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not _SMALLEST <= value <= _LARGEST:  # nor NaN, which is in no range
            return (
                f"{shown(value)} as the log-probability of token {place} of a "
                "completion, which is no logarithm of the probability of a sampled token"
            )
    return ""
