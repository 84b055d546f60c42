"""What all methods share: the policy, its optimizer, evaluation by graded completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdft_lightning.errors import UserError
from sdft_lightning.graders import Judge, grade_rows
from sdft_lightning.hidden import output_head
from sdft_lightning.lora import LoRA, keep_adapters_only_
from sdft_lightning.modules.accuracy import TaskAccuracies
from sdft_lightning.modules.capability import CapabilityScores, CapabilityTrack
from sdft_lightning.modules.effective_update import EffectiveUpdate
from sdft_lightning.modules.identity import check_same_model, model_identity
from sdft_lightning.modules.judging import log_usage
from sdft_lightning.modules.last_checkpoint import LastCheckpoint
from sdft_lightning.modules.precision import warn_of_slow_precision
from sdft_lightning.modules.schedule import Schedule
from sdft_lightning.modules.timing import TimedModule
from sdft_lightning.policy import WeightsDtype, load_policy, moved_not_cast
from sdft_lightning.quantization import Quantization
from sdft_lightning.rollout import SamplingWeights, greedy_rollout
from sdft_lightning.rollout.weights import SamplingDtype
from sdft_lightning.sharding import check_takes_shards, data_parallel_mesh, is_sharded, shard_
from sdft_lightning.teacher import Teacher
from sdft_lightning.types import (
    Demonstration,
    GenerationBatch,
    OutputHead,
    PromptBatch,
    Rollout,
    RowNeeds,
    ScoringBatch,
)

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
IDENTITY_KEY = "sdft_lightning"
CAPABILITY_KEY = "sdft_lightning_capability"
EvaluationBatch = PromptBatch | ScoringBatch | GenerationBatch


class Graded(NamedTuple):
    """Completions of a validation batch and their scores; `scores` is empty where ungraded."""

    task: str
    completions: list[str]
    scores: list[float]
    truncated: list[bool]


class PolicyModule(TimedModule):
    """Loads the policy, configures its optimizer, and evaluates it; methods add the step.

    Args:
        model_name: `embedded`, a folder written by save_pretrained, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        weights_dtype: Dtype of the trained weights; bfloat16 starves small updates.
        attn_implementation: Passed to transformers, e.g. sdpa or flash_attention_2.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        lora: Train low-rank adapters only (needs the extra `lora`), e.g. --model.lora.r=8.
        quantization: Keep what is frozen below the adapters in 4 bits, nf4 or fp4; on CUDA devices
            (needs the extra `qlora`).
        optimizer: Called with the student's trainable parameters only.
        schedule: How the learning rate moves.
        sampling_dtype: Weights to sample with: same, a bfloat16 copy, or auto (the copy where
            the hardware multiplies bfloat16).
        eval_max_new_tokens: Longest completion in validation, test and predict; these are greedy.
        seed: Seed of the sampled completions; set from seed_everything.

    Attributes:
        row_needs: What the method needs of every training row; the data module asks for it.
        has_preflight: Whether `preflight` can measure the method.
        student: The model being trained; None until `configure_model`.
    """

    student: Any

    row_needs: ClassVar[RowNeeds] = RowNeeds()
    has_preflight: ClassVar[bool] = False

    def __init__(
        self,
        model_name: str = "embedded",
        revision: str | None = None,
        weights_dtype: WeightsDtype = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
        optimizer: OptimizerFactory = lambda p: torch.optim.AdamW(p, lr=2e-5, weight_decay=0.0),
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        sampling_dtype: SamplingDtype = "auto",
        eval_max_new_tokens: int = 1024,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.revision = revision
        self.weights_dtype: WeightsDtype = weights_dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.lora = lora
        self.quantization: Quantization | None = quantization
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.eval_max_new_tokens = eval_max_new_tokens
        self.seed = seed
        if eval_max_new_tokens < 1:
            raise UserError(
                f"model.eval_max_new_tokens: got {eval_max_new_tokens}, allowed are 1 and more."
            )
        # Before any teacher, so that a checkpoint numbers the optimizer's parameters alike whether
        # it was written under fsdp2, which counts those of the whole module, or not.
        self.register_module("student", None)
        self.tokenizer: Any = None
        self.stop_ids: list[int] = []
        self.sampling_weights = SamplingWeights(sampling_dtype)
        self.accuracies = TaskAccuracies()
        self.capability = CapabilityTrack()
        self._capability_scores = CapabilityScores()

    # --- the policy -------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the models once, and spread them over processes where the strategy asks for it.

        Raises:
            UserError: Before anything is loaded, if the optimizer cannot train what is spread.
        """
        if self.device_mesh is not None and self.trainer.state.fn == "fit":
            check_takes_shards(self.optimizer_factory([nn.Parameter(torch.zeros(1))]))
        if self.student is None:
            self.load_models()
        if self.device_mesh is not None and not is_sharded(self.student):
            self.shard_models(data_parallel_mesh(self.device_mesh))

    def shard_models(self, mesh: Any) -> None:
        """Spread the student and its teacher over processes (FSDP2).

        Args:
            mesh: One-dimensional device mesh.

        Raises:
            UserError: With adapters, whose teacher shares the frozen weights.
        """
        if self.lora is not None:
            raise UserError(
                "model.lora: adapters under fsdp2 are not supported, since student and teacher "
                "share the frozen weights. Use --trainer.strategy=ddp, or train without adapters."
            )
        self.sampling_weights.prepare(self.student)
        shard_(self.student, mesh)
        for module in list(self.children()):
            if isinstance(module, Teacher):
                module.shard_(mesh)

    def load_models(self) -> None:
        """Load the policy."""
        policy = load_policy(
            self.model_name,
            self.revision,
            self.weights_dtype,
            self.attn_implementation,
            self.gradient_checkpointing,
            self.lora,
            self.quantization,
            self.seed,
        )
        self.student, self.tokenizer, self.stop_ids = policy
        if self.lora is not None:
            keep_adapters_only_(self, self.student)

    def check_before_fit(self, rows: Sequence[Demonstration]) -> None:
        """Refuse what cannot be trained, before a model is loaded or a file written.

        Args:
            rows: The rows to train on.
        """

    @property
    def whole_student(self) -> Any:
        """The student as a model that this process can call alone, not to be trained.

        Under fsdp2 this is the copy to sample with, which `gather` brings up to date.
        """
        if not is_sharded(self.student):
            return self.student
        return self.sampling_weights.model(self.student, self.trainer.global_step)

    def gather(self) -> None:
        """Bring the whole copies up to date on all processes at once, before they go their ways."""
        if is_sharded(self.student):
            self.sampling_weights.model(self.student, self.trainer.global_step)

    @property
    def student_head(self) -> OutputHead:
        """The student's output head."""
        return output_head(self.student)

    def on_fit_start(self) -> None:
        """Put the student into train mode: `from_pretrained` and Lightning leave it in eval."""
        self.student.train()
        self.forget_copies()
        warn_of_slow_precision(str(self.trainer.precision), self.device)
        if self.lora is not None:
            trained = self.student.num_parameters(only_trainable=True)
            total = self.student.num_parameters()
            self.print(
                f"LoRA: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PolicyModule:
        """Cast the student's weights only, see `moved_not_cast`; teachers see to themselves."""
        with moved_not_cast(self.student) if self.student is not None else nullcontext():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forget_copies(self) -> None:
        """Drop what was copied from weights that may have changed from outside."""
        self.sampling_weights.forget()

    def configure_callbacks(self) -> list[L.Callback]:
        """Each run is told whether its updates arrive, and keeps its last step."""
        return [EffectiveUpdate(), LastCheckpoint()]

    def configure_optimizers(self) -> Any:
        """The optimizer over the student's trainable parameters, and its schedule."""
        trainable = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = self.optimizer_factory(trainable)
        if getattr(optimizer, "seed", self.seed) is None:
            optimizer.seed = self.seed  # type: ignore[attr-defined] # one that draws numbers
        scheduler = self.schedule.build(optimizer, self.total_steps())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        trainer = self.trainer
        batches = getattr(getattr(trainer, "datamodule", None), "batches_per_epoch", None)
        if batches is None:
            return int(trainer.estimated_stepping_batches)
        # Not estimated_stepping_batches: it starts the loaders, which then forget their place
        # when a run is resumed (Lightning #20550).
        if isinstance(trainer.limit_train_batches, int):
            batches = min(batches, trainer.limit_train_batches)
        else:
            batches = int(batches * trainer.limit_train_batches)
        per_epoch = max(1, -(-batches // trainer.accumulate_grad_batches))
        epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        limits += [per_epoch * epochs] if epochs is not None else []
        return min(limits) if limits else per_epoch

    # --- checkpoints ------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down which model this is, and what it could do before training."""
        checkpoint[CAPABILITY_KEY] = self.capability.state()
        checkpoint[IDENTITY_KEY] = model_identity(self.student, self.model_name, type(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model.

        Raises:
            UserError: If it is one.
        """
        check_same_model(
            checkpoint.get(IDENTITY_KEY), model_identity(self.student, self.model_name, type(self))
        )
        self.capability.load(checkpoint.get(CAPABILITY_KEY))
        self.forget_copies()

    # --- evaluation -------------------------------------------------------------------------

    def greedy_completions(self, model: Any, prompt_ids: Tensor, prompt_mask: Tensor) -> Rollout:
        """The likeliest completions under `model`, with sampling weights where they are faster.

        Args:
            model: The student, or another model of its kind.
            prompt_ids: `(B, P)`, padded on the left.
            prompt_mask: `(B, P)`.
        """
        if model is self.student:
            model = self.sampling_weights.model(model, self.trainer.global_step)
        return greedy_rollout(
            model,
            prompt_ids,
            prompt_mask,
            self.eval_max_new_tokens,
            self.stop_ids,
            self.tokenizer.pad_token_id,
        )

    def decode(self, rollout: Rollout) -> list[str]:
        """Texts of the R completions, without special tokens."""
        return [
            self.tokenizer.decode(ids[mask], skip_special_tokens=True)
            for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)
        ]

    def graded_completions(
        self, model: Any, prompt_ids: Tensor, prompt_mask: Tensor, batch: PromptBatch, metric: str
    ) -> Graded:
        """Complete, grade and count a batch under the name `metric`."""
        rollout = self.greedy_completions(model, prompt_ids, prompt_mask)
        completions = self.decode(rollout)
        scores: list[float] = []
        if batch.grader:
            scores = grade_rows(batch.grader, completions, batch.rows, self._judge)
            self.accuracies.count(f"{batch.task}/{metric}", scores, self.device)
        return Graded(batch.task, completions, scores, rollout.truncated.tolist())

    def validation_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Grade the answers to questions, and respond to the requests of benchmarks."""
        if isinstance(batch, PromptBatch):
            return self.grade(batch)
        if self.capability.due:
            self._capability_scores.respond(self, batch)
        return {}

    def grade(self, batch: PromptBatch) -> dict[str, Any]:
        """Answer the questions of a batch greedily and grade the answers."""
        graded = self.graded_completions(
            self.student, batch.prompt_ids, batch.prompt_mask, batch, "accuracy"
        )
        return {"graded": graded}

    def test_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """As `validation_step`."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        """Decide whether the benchmarks are due."""
        self.gather()
        self.capability.begin(self.trainer)

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self.gather()
        self.capability.begin(self.trainer)

    def on_predict_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self.gather()

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy of each task with its 95 % interval, and the benchmarks."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_scores("test")

    @property
    def _judge(self) -> Judge | None:
        """Who is asked by the graders that ask: the data module knows."""
        judge: Judge | None = getattr(getattr(self.trainer, "datamodule", None), "judge", None)
        return judge

    def _log_scores(self, stage: str) -> None:
        if self._judge is not None:
            log_usage(self, self._judge, stage)
        for name, accuracy in self.accuracies.take(self.device).items():
            for suffix, value in zip(("", "_low", "_high"), accuracy, strict=True):
                self.log(f"{stage}/task/{name}{suffix}", value, rank_zero_only=False)
        suite = getattr(getattr(self.trainer, "datamodule", None), "benchmark_suite", None)
        if suite is not None and self.capability.due:
            measured = self._capability_scores.take(suite)
            for name, value in self.capability.record(
                measured, self.trainer, suite.fingerprint
            ).items():
                self.log(f"{stage}/capability/{name}", value, rank_zero_only=False)

    def predict_step(
        self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Answer the questions of a batch greedily."""
        rollout = self.greedy_completions(self.student, batch.prompt_ids, batch.prompt_mask)
        return [
            {"id": row.id, "prompt": row.prompt, "completion": text, "truncated": truncated}
            for row, text, truncated in zip(
                batch.rows, self.decode(rollout), rollout.truncated.tolist(), strict=True
            )
        ]
