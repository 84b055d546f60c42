"""Who samples the student's completions in training: an engine, chosen in the config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.fused import ReadPrompts
from sdft_lightning.rollout.generate import generate_rollout
from sdft_lightning.rollout.sampling import Sampling
from sdft_lightning.rollout.uniforms import row_uniforms
from sdft_lightning.rollout.weights import SamplingWeights
from sdft_lightning.types import Rollout


class RolloutRequest(NamedTuple):
    """What is to be sampled.

    Attributes:
        prompt_ids: `(B, P)`, padded on the left.
        prompt_mask: `(B, P)` boolean.
        row_ids: B ids; random numbers belong to them.
        sampling: Temperature, truncation, length, completions per prompt (n).
        seed: Seed of the run.
        step: Optimizer step; the weights are those of this step.
        stop_ids: Ids of which any ends a completion; it is part of the completion.
        pad_id: Id that fills the rest of a row.
        read: What the present weights have read of the prompts already, where they are fused.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    row_ids: list[str]
    sampling: Sampling
    seed: int
    step: int
    stop_ids: list[int]
    pad_id: int
    read: list[ReadPrompts] | None = None


class Engine(ABC):
    """Samples completions from the student's present weights.

    Attributes:
        is_trainer: Whether it is the trained model itself that samples.
        truncates_log_probs: Whether `sampled_log_probs` are those after top-k, top-p and min-p, and
            not before.
        takes_shards: Whether it samples from a model that is spread over processes (fsdp2).
    """

    is_trainer: ClassVar[bool] = False
    truncates_log_probs: ClassVar[bool] = False
    takes_shards: ClassVar[bool] = True

    def check(self, sampling: Sampling, quantized: bool) -> None:  # noqa: B027 - most need none
        """Refuse, before a model is loaded, what the engine cannot do.

        Args:
            sampling: How completions will be sampled.
            quantized: Whether the student's frozen weights are kept in 4 bits.

        Raises:
            UserError: Names the option and the remedy.
        """

    @abstractmethod
    def generate(self, student: Any, weights: SamplingWeights, request: RolloutRequest) -> Rollout:
        """Sample completions.

        Args:
            student: The trained model.
            weights: Keeps the copy of the student that transformers samples with.
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

    def generate(self, student: Any, weights: SamplingWeights, request: RolloutRequest) -> Rollout:
        """See `generate_rollout`."""
        sampling = request.sampling
        uniforms = row_uniforms(
            request.seed,
            request.step,
            request.row_ids,
            sampling.completions_per_prompt,
            sampling.max_new_tokens,
        )  # (R, T)
        return generate_rollout(
            weights.model(student, request.step),
            request.prompt_ids,
            request.prompt_mask,
            sampling,
            uniforms,
            request.stop_ids,
            request.pad_id,
            read=request.read,
        )


def whole_weights_wanted() -> UserError:
    """What is said of an engine that does not take shards."""
    return UserError(
        "model.engine: under fsdp2 no process has the whole weights that vLLM wants. Use "
        "--trainer.strategy=ddp or --model.engine=TransformersEngine."
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
