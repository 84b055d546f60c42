"""What all methods share: the policy, its optimizer, its checkpoints; methods add the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from sdft_lightning.errors import UserError, check_arguments, show_messages
from sdft_lightning.files.checkpoint_io import write_whole_checkpoints
from sdft_lightning.forward.hidden import plain_attention
from sdft_lightning.forward.policy import Policy, load_policy, moved_not_cast
from sdft_lightning.models.lora import keep_adapters_only_
from sdft_lightning.models.sharding import data_parallel_mesh, is_sharded, shard_
from sdft_lightning.modules.checkpoints import Checkpoints
from sdft_lightning.modules.evaluation import Evaluation, EvaluationBatch, Evaluator
from sdft_lightning.modules.retained import RetainedRows
from sdft_lightning.modules.run_callbacks import callbacks_of_every_run
from sdft_lightning.modules.run_checks import RunChecks
from sdft_lightning.modules.schedule import Schedule, total_steps
from sdft_lightning.modules.student_checks import (
    OptimizerFactory,
    adapter_report,
    check_can_shard,
    check_optimizer,
    check_student,
    trial_optimizer,
    warn_of_slow_precision,
)
from sdft_lightning.modules.window import (
    StepValues,
    Timing,
    WindowGradients,
    clipping_without_scale,
)
from sdft_lightning.rollout import StudentPasses
from sdft_lightning.teacher import Teacher
from sdft_lightning.types import (
    Demonstration,
    OutputHead,
    PromptBatch,
    RowNeeds,
    TaskData,
    task_data,
)


class PolicyModule(L.LightningModule):
    """Loads the policy, trains it, measures it; by itself it has no step, which methods add.

    Args:
        policy: Which model is trained, in which form.
        optimizer: Called with the student's trainable parameters only.
        schedule: How the learning rate moves.
        evaluation: How answers are measured in validation, test and predict.
        initial_copy: Keep a frozen copy of the model as it was before training, 4 bytes a
            parameter: what rows to retain (data.retain) are compared with where neither a
            FrozenTeacher nor adapters keep it.
        seed: Seed of all completions that are sampled; set from seed_everything.
        unknown: None are taken; names of before are answered with those of now.

    Attributes:
        row_needs: What the method needs of every training row; the data module asks for it.
        has_preflight: Whether `preflight` can measure the method.
        has_graded_teacher: Whether there is a teacher whose answers can be graded.
        student: The model being trained; None until `configure_model`.
        tokenizer: The student's.
        stop_ids: Tokens that end a completion.
        passes: What the student computes on its present weights, and samples with.
        loads_teacher: Whether the models that stand beside the student, if any, are loaded with it.
        step_values: What steps log of each accumulation window.
        completion_tokens: Tokens of completions that a micro-batch trains on; set by the step.
    """

    row_needs: ClassVar[RowNeeds] = RowNeeds()
    has_preflight: ClassVar[bool] = False
    has_graded_teacher: ClassVar[bool] = False
    student: Any
    initial: Any

    def __init__(
        self,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        optimizer: OptimizerFactory = lambda p: torch.optim.AdamW(p, lr=2e-5, weight_decay=0.0),
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - frozen
        initial_copy: bool = False,
        seed: int = 42,
        **unknown: Any,
    ) -> None:
        super().__init__()
        check_arguments(type(self).__name__, unknown)
        show_messages()
        if evaluation.teacher_in_fit and not self.has_graded_teacher:
            raise UserError(
                f"model.evaluation.teacher_in_fit: got true, and {type(self).__name__} has no "
                "teacher that answers questions. Leave it out."
            )
        self.policy = policy
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.evaluation = evaluation
        self.seed = seed
        # Before any teacher, so that a checkpoint numbers the optimizer's parameters alike whether
        # it was written under fsdp2, which counts those of the whole module, or not.
        self.register_module("student", None)
        self.register_module("initial", None)  # see `RetainedRows`
        self.tokenizer: Any = None
        self.stop_ids: list[int] = []
        self._passes = StudentPasses(policy.sampling_dtype)
        self.loads_teacher = True
        self.checks = RunChecks(self)
        self.checkpoints = Checkpoints(self)
        self.evaluator = Evaluator(self, evaluation)
        self.timing = Timing(self)
        self.gradients = WindowGradients(self)
        self.step_values = StepValues()
        self.retained_rows = RetainedRows(self, initial_copy)
        self.completion_tokens = 0
        self._is_checked = False

    # --- checks, and which models a command needs -----------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the run, and decide which models it needs, before they are loaded.

        Raises:
            UserError: See `check_run`.
        """
        command, data = str(getattr(stage, "value", stage)), task_data(self.trainer)
        self.checks.at_setup(self.trainer, command, data)
        write_whole_checkpoints(self.trainer)
        self.plan_models(self.trainer, command, data)

    def plan_models(self, trainer: L.Trainer, command: str, data: TaskData | None) -> None:
        """Decide whether a command needs a teacher; what it does not use is not loaded.

        Args:
            trainer: Who carries out the command.
            command: fit, validate, test or predict.
            data: The data module, set up, or None.
        """
        # This strategy reads checkpoints by itself, and whole.
        spread = isinstance(trainer.strategy, ModelParallelStrategy)
        self.loads_teacher = spread or self.uses_teacher(command, data)

    def uses_teacher(self, command: str, data: TaskData | None) -> bool:
        """Whether a command uses the models that stand beside the student.

        Args:
            command: fit, validate, test, predict or export.
            data: The data module, set up, or None.
        """
        return command == "fit"

    def check_before_fit(self, rows: Sequence[Demonstration]) -> None:
        """Refuse what cannot be trained, before a model is loaded or a file written.

        Args:
            rows: The rows to train on.

        Raises:
            UserError: If the optimizer refuses its options, or takes no gradients of ours.
        """
        check_optimizer(self.optimizer_factory)
        self.schedule.check_options(self.trial_optimizer())

    def trial_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over a parameter of no meaning."""
        return trial_optimizer(self.optimizer_factory)

    @property
    def step_names(self) -> list[str]:
        """Names of what training steps log; see `check_monitors`."""
        names = ["perf/step_seconds", "perf/backward_seconds", "perf/tokens_per_second"]
        return names + self.retained_rows.step_names

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

    # --- the models -----------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the models once, and spread them over processes where the strategy asks for it.

        Raises:
            UserError: Before anything is loaded, see `check_can_shard`.
        """
        if self.device_mesh is not None:
            self.check_can_shard(self.trainer.state.fn == "fit")
        if self.student is None:
            self.load_models()
        if self.loads_teacher and not all(each.is_loaded for each in self.teachers.values()):
            self.load_teacher()
        self.retained_rows.load()
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
        check_can_shard(self.policy, self.trial_optimizer() if trains else None)

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
        for teacher in self.teachers.values():
            teacher.shard_(mesh)

    @property
    def teachers(self) -> dict[str, Teacher]:
        """The models that stand beside the student, by name, loaded or not."""
        return {name: each for name, each in self.named_children() if isinstance(each, Teacher)}

    def load_models(self) -> None:
        """Load the policy."""
        loaded = load_policy(self.policy, self.seed, check=False)  # see `check_models`
        self.student, self.tokenizer, self.stop_ids = loaded
        if self.policy.lora is not None:
            keep_adapters_only_(self, self.student)

    def load_teacher(self) -> None:
        """Make the teacher from the student, before any training, in methods that have one."""

    @property
    def teacher_before_training(self) -> Teacher | None:
        """A teacher of the method that stays as the model was before training."""
        return None

    def check_models(self) -> None:
        """Compute a few tokens, once, on the device and in the precision of the run."""
        if not self._is_checked:
            check_student(self)
        self._is_checked = True

    @property
    def passes(self) -> StudentPasses:
        """The student's passes on its present weights."""
        step = 0 if self._trainer is None else self._trainer.global_step
        return self._passes.at(self.student, step)

    def gather_student(self) -> Any:
        """The student as a model that this process can call alone, not to be trained.

        Under fsdp2 this is the copy to sample with. Where the weights have moved since it was
        last brought up to date, this takes all processes at once.
        """
        return self.passes.whole()

    def gather(self) -> None:
        """Bring the whole copies up to date on all processes at once, before they go their ways."""
        self.gather_student()

    def gather_head(self) -> OutputHead:
        """The student's output head; under fsdp2 this takes all processes at once."""
        return self.passes.head()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PolicyModule:
        """Cast the student's weights only, see `moved_not_cast`; teachers see to themselves."""
        with moved_not_cast(self.student) if self.student is not None else nullcontext():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forget_copies(self) -> None:
        """Drop what was copied from weights that may have changed from outside."""
        self._passes.forget()

    # --- callbacks and optimizer ----------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """What every run has: benchmarks at both ends, its last step saved, whole windows."""
        return callbacks_of_every_run()

    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None where neither steps nor epochs end it."""
        return total_steps(self.trainer)

    def configure_optimizers(self) -> Any:
        """The optimizer over the student's trainable parameters, and its schedule."""
        trainable = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = self.optimizer_factory(trainable)
        self.checkpoints.check_optimizer(optimizer)
        if getattr(optimizer, "seed", self.seed) is None:
            optimizer.seed = self.seed  # type: ignore[attr-defined] # one that draws numbers
        scheduler = self.schedule.build(optimizer, self.total_steps())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # --- training: what surrounds a method's step ------------------------------------------------

    def on_fit_start(self) -> None:
        """Put the student into train mode: `from_pretrained` and Lightning leave it in eval."""
        self.check_models()
        self.student.train()
        self.forget_copies()
        weights = next(self.student.parameters()).dtype
        warn_of_slow_precision(str(self.trainer.precision), self.device, weights)
        if self.policy.lora is not None:
            for line in adapter_report(self.student, self.policy.lora):
                self.print(line)

    @property
    def window_ends(self) -> bool:
        """Whether the optimizer steps with the micro-batch under way."""
        return not self.trainer.fit_loop._should_accumulate()

    def on_train_start(self) -> None:
        """Begin the log and the gradients of a window; one that was begun before is not saved."""
        self.timing.restart()
        self.gradients.restart()
        self.step_values.reset()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock of the micro-batch."""
        self.timing.start("step")

    def on_before_backward(self, loss: Tensor) -> None:
        """Log what the window of an optimizer step shows, before any callback asks for it."""
        if self.window_ends:
            for name, value in self.step_values.take().items():
                self.log(f"train/{name}", value, prog_bar=name in ("loss", "kl"))
        self.timing.start("backward")

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of a micro-batch, so that a window's are the mean over its own."""
        super().backward(loss, *args, **kwargs)
        self.gradients.added()

    def on_after_backward(self) -> None:
        """Stop the clock of the backward pass."""
        self.timing.stop("backward")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, in bfloat16 also for fused optimizers; see `window`."""
        with clipping_without_scale(self.trainer.precision_plugin):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the seconds of an optimizer step, and drop its gradients."""
        self.timing.end_micro_batch(self.completion_tokens)
        if self.window_ends:
            self.timing.log()
        self.gradients.drop_after_step()

    # --- evaluation -----------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Check the student before its first answers, where no fit has."""
        self.check_models()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_epoch_start(self) -> None:
        """Bring whole copies up to date, and decide whether the benchmarks are due."""
        self.gather()
        self.evaluator.begin()

    on_test_epoch_start = on_validation_epoch_start

    def on_predict_epoch_start(self) -> None:
        """Bring whole copies up to date."""
        self.gather()

    def validation_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Grade the answers to questions, and respond to the requests of benchmarks."""
        if isinstance(batch, PromptBatch):
            return self.grade(batch)
        self.evaluator.respond(batch)
        return {}

    def test_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Grade the answers to questions, and respond to the requests of benchmarks."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(
        self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Answer the questions of a batch greedily."""
        return self.evaluator.predictions(batch)

    def grade(self, batch: PromptBatch) -> dict[str, Any]:
        """Answer the questions of a batch greedily and grade the answers."""
        graded = self.evaluator.graded(self.student, batch.prompts, batch, "accuracy")
        return {"graded": graded}

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy of each task, and the benchmarks."""
        self.evaluator.log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of each task, and the benchmarks."""
        self.evaluator.log_scores("test")

    # --- checkpoints ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down which model this is, and what it could do before training."""
        self.checkpoints.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, and leave out what this command does not use."""
        in_fit = self._trainer is not None and self._trainer.state.fn == "fit"
        self.checkpoints.load(checkpoint, in_fit)
        self.forget_copies()
