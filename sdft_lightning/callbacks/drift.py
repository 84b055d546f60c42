"""How far the student has moved from the base model where nothing should have changed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.hidden import autocast_if_needed_, completion_hidden_states, output_head
from sdft_lightning.forward.policy import Policy, check_model, load_policy
from sdft_lightning.graders.metrics import NamedMetrics, WeightedMean
from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.losses.masking import sequence_weights
from sdft_lightning.models.lora import base_copy
from sdft_lightning.models.precision import takes_float32
from sdft_lightning.types import OutputHead, Rollout, task_data


class _BaseAnswers(NamedTuple):
    """What the base model answered to a batch of questions, and what it thought meanwhile."""

    rollout: Rollout
    hidden: Tensor  # (N, D)


class DriftMonitor(L.Callback):
    """Logs val/drift/<set>: KL(base ‖ student) in nats a token, on the base model's own answers.

    In a test it is test/drift/<set>. The mean is over the tokens of each answer, then over
    answers. The base model is loaded at the first validation, also in a resumed run, and only its
    answers and output head are kept. With LoRA it is the student with its adapters off, unless
    another is named.

    Args:
        held_out: Names of the sets in data.held_out.
        model_name: The base model to compare with; the model that the run starts from without it.
        revision: Its branch, tag or commit on the Hub.
    """

    def __init__(
        self, held_out: list[str], model_name: str | None = None, revision: str | None = None
    ) -> None:
        self.held_out = held_out
        self.model_name = model_name
        self.revision = revision
        self._base: Any = None
        self._head: OutputHead | None = None
        self._answers: dict[tuple[str, int], _BaseAnswers] = {}
        self._drift = NamedMetrics(WeightedMean)

    @property
    def validation_names(self) -> list[str]:
        """What a validation logs."""
        return [f"drift/{name}" for name in self.held_out]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the names.

        Raises:
            UserError: If the data module has no such set.
        """
        data = task_data(trainer)
        known = [] if data is None else list(data.held_out)
        for name in self.held_out:
            if name not in known:
                raise UserError(
                    f"DriftMonitor.held_out: there is no set {name!r} in data.held_out, which has "
                    f"{', '.join(known) or 'none'}."
                )

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Compare the student with the base model on the base model's answers."""
        if getattr(batch, "task", None) not in self.held_out:  # also the requests of benchmarks
            return
        key = (batch.task, batch_idx)
        if key not in self._answers:
            self._answers[key] = self._answer(module, batch)
        answers = self._answers[key]
        mask = answers.rollout.completion_mask  # (B, T)
        student = module.gather_student()
        plain = takes_float32(student)
        with nullcontext() if plain else trainer.precision_plugin.forward_context():
            hidden = completion_hidden_states(
                student,
                batch.prompts,
                answers.rollout.completions,
                mask,
            )  # (N, D)
        assert self._head is not None
        mean, _ = bounded_divergence(
            answers.hidden,
            self._head,
            hidden,
            output_head(student),
            answers.rollout.completion_ids[mask],
            sequence_weights(mask)[mask],
            Divergence("forward_kl"),
        )
        rows = len(batch.rows)
        self._drift.of(batch.task, module.device).update(mean.detach(), rows)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch of a test to its set."""
        self.on_validation_batch_end(trainer, module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        """Log the mean of each set over all ranks."""
        self._log(trainer, module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        """Log the mean of each set over all ranks, as of a test."""
        self._log(trainer, module, "test")

    def _log(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        for name, mean in self._drift.compute(module.device).items():
            module.log(f"{stage}/drift/{name}", mean, rank_zero_only=False)
        self._base = None  # its answers are kept; they take a few megabytes

    @torch.no_grad()
    def _answer(self, module: Any, batch: Any) -> _BaseAnswers:
        if self._base is None:
            self._base = self._base_model(module)
            head = output_head(self._base)
            self._head = head._replace(weight=head.weight.clone())
        rollout = module.evaluator.greedy_completions(self._base, batch.prompts)
        hidden = completion_hidden_states(
            self._base,
            batch.prompts,
            rollout.completions,
            rollout.completion_mask,
        )  # (N, D)
        return _BaseAnswers(rollout, hidden)

    def _base_model(self, module: Any) -> Any:
        own = self.model_name is None and module.policy.lora is not None
        base = base_copy(module.student) if own else self._load(module)
        base.to(module.device).eval()
        autocast_if_needed_(base)
        if not own:
            with module.trainer.precision_plugin.forward_context():
                check_model(base)
        return base

    def _load(self, module: Any) -> Any:
        start: Policy = module.policy
        if self.model_name is not None:
            start = replace(start, name=self.model_name, revision=self.revision)
        plain = replace(start, gradient_checkpointing=False, lora=None, quantization=None)
        return load_policy(plain, check=False).model.requires_grad_(False)
