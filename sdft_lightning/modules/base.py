"""What all methods share: the policy, its optimizer, its checkpoints; methods add the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from sdft_lightning.errors import UserError, printable, show_messages
from sdft_lightning.files.checkpoint_io import check_finite_checkpoint, write_whole_checkpoints
from sdft_lightning.files.whole_windows import WholeWindows, limited_batches
from sdft_lightning.forward.hidden import autocast_if_needed_, plain_attention
from sdft_lightning.forward.policy import WeightsDtype, check_model, load_policy, moved_not_cast
from sdft_lightning.forward.probe import NotComputed
from sdft_lightning.models.lora import ALL_LINEAR, LoRA, frozen_matrices, keep_adapters_only_
from sdft_lightning.models.precision import Quantization, takes_float32
from sdft_lightning.models.sharding import (
    check_takes_shards,
    data_parallel_mesh,
    is_sharded,
    shard_,
)
from sdft_lightning.modules.effective_update import EffectiveUpdate
from sdft_lightning.modules.evaluated import EvaluatedModule
from sdft_lightning.modules.identity import (
    IDENTITY_KEY,
    check_same_groups,
    check_same_model,
    check_same_moments,
    check_same_weights,
    check_takes,
    model_identity,
)
from sdft_lightning.modules.last_checkpoint import LastCheckpoint
from sdft_lightning.modules.precision import clipping_without_scale, warn_of_slow_precision
from sdft_lightning.modules.run_checks import check_run
from sdft_lightning.modules.run_length import RunLength
from sdft_lightning.modules.schedule import Schedule
from sdft_lightning.modules.step_values import StepValues
from sdft_lightning.modules.validate_at_ends import ValidateAtEnds
from sdft_lightning.rollout.student import SamplingDtype
from sdft_lightning.teacher import Teacher
from sdft_lightning.types import (
    Demonstration,
    OutputHead,
    RowNeeds,
    TaskData,
    task_data,
)

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
CAPABILITY_KEY = "sdft_lightning_capability"


class PolicyModule(EvaluatedModule):
    """Loads the policy and configures its optimizer; methods add the step.

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
        loads_teacher: Whether the models that stand beside the student, if any, are loaded with it.
    """

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
        super().__init__(eval_max_new_tokens, sampling_dtype)
        show_messages()
        self.model_name = model_name
        self.revision = revision
        self.weights_dtype: WeightsDtype = weights_dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.lora = lora
        self.quantization: Quantization | None = quantization
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.seed = seed
        self.loads_teacher = True
        self._optimizer_states: list[dict[str, Any]] | None = None  # of a checkpoint
        self._is_checked = False
        self._checked_ahead: tuple[L.Trainer, str] | None = None
        self.step_values = StepValues()
        self._in_window = 0  # micro-batches whose gradients have been added up
        self._dropped_at = 0  # optimizer step after which gradients were dropped

    # --- the policy -------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the run, and decide which models it needs, before they are loaded.

        Raises:
            UserError: See `check_run`.
        """
        command, data = str(getattr(stage, "value", stage)), task_data(self.trainer)
        if self._checked_ahead != (self.trainer, command):
            check_run(self, data, self.trainer, command)
        self._checked_ahead = None
        write_whole_checkpoints(self.trainer)
        self.plan_models(self.trainer, command, data)

    def check_ahead(self, trainer: L.Trainer, command: str, data: TaskData | None) -> None:
        """Check a run before the trainer begins it and writes files; `setup` does not repeat it.

        Args:
            trainer: Who will carry out the command.
            command: fit, validate, test or predict.
            data: The data module, set up; None for one that is not asked.

        Raises:
            UserError: See `check_run`.
        """
        check_run(self, data, trainer, command)
        self._checked_ahead = (trainer, command)

    def forget_check(self) -> None:
        """Let `setup` check the run again."""
        self._checked_ahead = None

    def plan_models(self, trainer: L.Trainer, command: str, data: TaskData | None) -> None:
        """Decide whether a command needs a teacher; what it does not use is not loaded.

        Args:
            trainer: Who carries out the command.
            command: fit, validate, test or predict.
            data: The data module, set up, or None.
        """
        # These strategies read checkpoints by themselves, and whole.
        spread = isinstance(trainer.strategy, ModelParallelStrategy | DeepSpeedStrategy)
        self.loads_teacher = spread or self.uses_teacher(command, data)

    def uses_teacher(self, command: str, data: TaskData | None) -> bool:
        """Whether a command uses the models that stand beside the student.

        Args:
            command: fit, validate, test, predict or export.
            data: The data module, set up, or None.
        """
        return command == "fit"

    def configure_model(self) -> None:
        """Load the models once, and spread them over processes where the strategy asks for it.

        Raises:
            UserError: Before anything is loaded, see `check_can_shard`.
        """
        if self.device_mesh is not None:
            self.check_can_shard(self.trainer.state.fn == "fit")
        if self.student is None:
            self.load_models()
        if self.loads_teacher and not all(each.is_loaded for each in self._teachers):
            self.load_teacher()
        if self.device_mesh is not None and not is_sharded(self.student):
            with plain_attention(self.student):  # while each process has a whole model on the CPU
                self.check_models()
            self.shard_models(data_parallel_mesh(self.device_mesh))

    def check_can_shard(self, trains: bool) -> None:
        """Refuse what cannot be spread over processes (FSDP2).

        Args:
            trains: Whether it will be trained.

        Raises:
            UserError: With adapters, whose teacher shares the frozen weights, or an optimizer that
                cannot train what is spread.
        """
        if trains:
            check_takes_shards(self.trial_optimizer())
        if self.lora is not None:
            raise UserError(
                "model.lora: adapters under fsdp2 are not supported, since student and teacher "
                "share the frozen weights. Use --trainer.strategy=ddp, or train without adapters."
            )

    def shard_models(self, mesh: Any) -> None:
        """Spread the student and its teacher over processes (FSDP2).

        Args:
            mesh: One-dimensional device mesh.

        Raises:
            UserError: See `check_can_shard`.
        """
        self.check_can_shard(trains=False)
        self._passes.prepare(self.student)
        shard_(self.student, mesh)
        for teacher in self._teachers:
            teacher.shard_(mesh)

    @property
    def _teachers(self) -> list[Teacher]:
        return [module for module in self.children() if isinstance(module, Teacher)]

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
            check=False,  # see `check_models`
        )
        self.student, self.tokenizer, self.stop_ids = policy
        if self.lora is not None:
            keep_adapters_only_(self, self.student)

    def load_teacher(self) -> None:
        """Make the teacher from the student, before any training, in methods that have one."""

    def check_models(self) -> None:
        """Compute a few tokens, once, on the device and in the precision of the run.

        Raises:
            UserError: See `check_model`.
        """
        if self._is_checked:
            return
        with self.trainer.precision_plugin.forward_context():
            try:
                check_model(self.student)
            except Exception as error:  # attention kernels refuse in their own words
                told = isinstance(error, UserError) and not isinstance(error, NotComputed)
                if told or takes_float32(self.student):
                    raise
                raise UserError(
                    f"model.attn_implementation: {self.student.config._attn_implementation} cannot "
                    f"compute with trainer.precision {self.trainer.precision} on {self.device}: "
                    f"{error}. Use --trainer.precision=bf16-mixed (flash attention takes half "
                    "precision on a GPU only), or --model.attn_implementation=sdpa."
                ) from error
            for teacher in self._teachers:
                if teacher.is_loaded and teacher.network is not self.student:
                    autocast_if_needed_(teacher.network)
        self._is_checked = True

    def check_before_fit(self, rows: Sequence[Demonstration]) -> None:
        """Refuse what cannot be trained, before a model is loaded or a file written.

        Args:
            rows: The rows to train on.

        Raises:
            UserError: If the optimizer refuses its options, or takes no gradients of ours.
        """
        try:
            optimizer = self.trial_optimizer()
        except ValueError as error:
            raise UserError(
                f"model.optimizer: it refuses its options: {printable(str(error))}. Correct "
                "--model.optimizer."
            ) from error
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise UserError(
                "model.optimizer: SparseAdam takes sparse gradients only, which no language model "
                "has here. Use --model.optimizer=torch.optim.AdamW."
            )

    def trial_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over a parameter of no meaning; of a matrix, which all optimizers take."""
        return self.optimizer_factory([nn.Parameter(torch.zeros(1, 1))])

    @property
    def step_names(self) -> list[str]:
        """Names of what training steps log; see `check_monitors`."""
        return ["perf/step_seconds", "perf/backward_seconds", "perf/tokens_per_second"]

    def grades_in_fit(self, taught: bool) -> bool:
        """Whether validations of a fit grade a teacher.

        Args:
            taught: Whether the questions come with demonstrations.
        """
        return False

    @property
    def new_tokens(self) -> int:
        """Longest completion that is sampled in training; 0 where none is."""
        return 0

    def gather_head(self) -> OutputHead:
        """The student's output head; under fsdp2 this takes all processes at once."""
        return self.passes.head()

    def on_fit_start(self) -> None:
        """Put the student into train mode: `from_pretrained` and Lightning leave it in eval."""
        self.check_models()
        self.student.train()
        self.forget_copies()
        weights = next(self.student.parameters()).dtype
        warn_of_slow_precision(str(self.trainer.precision), self.device, weights)
        if self.lora is not None:
            trained = self.student.num_parameters(only_trainable=True)
            total = self.student.num_parameters()
            self.print(
                f"LoRA: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
            )
            frozen = frozen_matrices(self.student)
            if frozen and self.lora.target_modules == ALL_LINEAR:
                kinds = ", ".join(f"{kind} ({len(names)})" for kind, names in frozen.items())
                self.print(f"LoRA: all-linear leaves these matrices frozen: {kinds}")

    def on_validation_start(self) -> None:
        """Check the student before its first answers, where no fit has."""
        self.check_models()

    def on_test_start(self) -> None:
        """Check the student before its first answers."""
        self.check_models()

    def on_predict_start(self) -> None:
        """Check the student before its first answers."""
        self.check_models()

    def on_train_start(self) -> None:
        """Of a run that was resumed inside of a window, the first gradients are kept, too.

        What is logged of that window's step, and the mean of its gradients, is of the micro-batches
        that were left: those before are in no checkpoint.
        """
        super().on_train_start()
        self._dropped_at = self.trainer.global_step
        self._in_window = 0
        self.step_values.reset()

    def on_before_backward(self, loss: Tensor) -> None:
        """Log what the window of an optimizer step shows, before any callback asks for it."""
        if self.window_ends:
            for name, value in self.step_values.take().items():
                self.log(f"train/{name}", value, prog_bar=name in ("loss", "kl"))
        super().on_before_backward(loss)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of a micro-batch, so that a window's are the mean over its own.

        Lightning divides each loss by `accumulate_grad_batches`, also where an epoch's last window
        has fewer. The loss that is logged stays as it is.
        """
        super().backward(loss, *args, **kwargs)
        self._in_window += 1
        if not self.window_ends:
            return
        full, found, self._in_window = self.trainer.accumulate_grad_batches, self._in_window, 0
        if found != full:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(full / found)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Drop gradients after a step, when callbacks have seen them: the next needs the memory."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.global_step != self._dropped_at:
            self._dropped_at = self.trainer.global_step
            for parameter in self.student.parameters():
                parameter.grad = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PolicyModule:
        """Cast the student's weights only, see `moved_not_cast`; teachers see to themselves."""
        with moved_not_cast(self.student) if self.student is not None else nullcontext():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forget_copies(self) -> None:
        """Drop what was copied from weights that may have changed from outside."""
        self._passes.forget()

    def configure_callbacks(self) -> list[L.Callback]:
        """What every run has: benchmarks at both ends, its last step saved, whole windows."""
        return [
            ValidateAtEnds(),
            EffectiveUpdate(),
            LastCheckpoint(),
            RunLength(),
            WholeWindows(),
        ]

    def configure_optimizers(self) -> Any:
        """The optimizer over the student's trainable parameters, and its schedule."""
        trainable = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = self.optimizer_factory(trainable)
        check_same_groups(self._optimizer_states, optimizer)
        check_same_moments(self._optimizer_states, optimizer)
        self._optimizer_states = None
        if getattr(optimizer, "seed", self.seed) is None:
            optimizer.seed = self.seed  # type: ignore[attr-defined] # one that draws numbers
        scheduler = self.schedule.build(optimizer, self.total_steps())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None where neither steps nor epochs end it."""
        trainer = self.trainer
        data = task_data(trainer)
        batches = None if data is None else data.batches_per_epoch
        if batches is None:
            estimate = trainer.estimated_stepping_batches
            return int(estimate) if math.isfinite(estimate) else None
        # Not estimated_stepping_batches: it starts the loaders, which then forget their place
        # when a run is resumed (Lightning #20550).
        batches = limited_batches(trainer, batches)
        per_epoch = max(1, -(-batches // trainer.accumulate_grad_batches))
        epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
        limits = [max(1, trainer.max_steps)] if trainer.max_steps != -1 else []
        limits += [per_epoch * epochs] if epochs is not None else []
        return min(limits) if limits else None

    # --- checkpoints ------------------------------------------------------------------------

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, in bfloat16 also for fused optimizers.

        Lightning refuses these in all mixed precisions, since with float16 they divide gradients by
        the scale themselves; bfloat16 has no scale.
        """
        with clipping_without_scale(self.trainer.precision_plugin):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down which model this is, and what it could do before training.

        Raises:
            UserError: If a weight is no number: no such checkpoint is written.
        """
        check_finite_checkpoint(self, checkpoint)
        checkpoint[CAPABILITY_KEY] = self.capability.state()
        identity = model_identity(self.student, self.model_name, type(self))
        checkpoint[IDENTITY_KEY] = {
            **identity,
            "teacher": self._teacher_name,
            "optimizer": type(self.trial_optimizer()).__name__,
        }

    @property
    def _teacher_name(self) -> str | None:
        return next((type(each).__name__ for each in self._teachers), None)

    def check_checkpoint(self, checkpoint: dict[str, Any], trains: bool) -> None:
        """Refuse, before a model is loaded, a checkpoint that cannot be used here.

        Args:
            checkpoint: Its content.
            trains: Whether training is to go on from it.

        Raises:
            UserError: See `check_takes`.
        """
        teacher = self._teacher_name if self.loads_teacher else None
        optimizer = type(self.trial_optimizer()).__name__ if trains else None
        check_takes(checkpoint, type(self).__name__, teacher, optimizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, and leave out what this command does not use.

        Raises:
            UserError: If it is one.
        """
        weights = checkpoint.get("state_dict")  # None where the strategy has read them
        in_fit = self._trainer is not None and self._trainer.state.fn == "fit"
        trains = in_fit and weights is not None
        self.check_checkpoint(checkpoint, trains)
        check_same_model(
            checkpoint.get(IDENTITY_KEY), model_identity(self.student, self.model_name, type(self))
        )
        unused = tuple(
            f"{name}."
            for name, module in self.named_children()
            if isinstance(module, Teacher) and not module.is_loaded
        )
        if weights is not None:
            kept = {name: value for name, value in weights.items() if not name.startswith(unused)}
            check_same_weights(kept, self.state_dict())
            checkpoint["state_dict"] = kept
        self._optimizer_states = checkpoint.get("optimizer_states") if trains else None
        self.capability.load(checkpoint.get(CAPABILITY_KEY))
        self.forget_copies()
