"""Held-out capabilities: tasks of lm-evaluation-harness as batches of requests, and which of them.

`BenchmarkSuite` is imported when it is asked for, as the names of `sdft_lightning.data` are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sdft_lightning.errors import UserError, check_choice

if TYPE_CHECKING:
    from sdft_lightning.data.benchmarks.suite import BenchmarkSuite

__all__ = ["BenchmarkSuite", "BenchmarkTask", "Benchmarks"]

Mean = Literal["alike", "any", "off"]


@dataclass(frozen=True)
class BenchmarkTask:
    """One task or group of lm-evaluation-harness.

    Args:
        name: Its name in the harness, one that this package ships (kept_instructions,
            kept_questions, kept_text), or the path of a task YAML (see `tasks.load_tasks`).
        metric: The metric that enters the mean, e.g. acc or exact_match,strict-match.
        num_fewshot: Examples before each question; the task's own number without it.
        limit: Only the first so many items; a fraction below 1 is taken of each task.
        apply_chat_template: Ask through the chat template.
        fewshot_as_multiturn: Give the examples as chat turns; without it, wherever the chat
            template is applied, as the harness's command does.
        system_instruction: System turn of the chat template.
    """

    name: str
    metric: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None

    @property
    def multiturn(self) -> bool:
        """Whether examples are chat turns."""
        asked = self.fewshot_as_multiturn
        return self.apply_chat_template if asked is None else asked


@dataclass(frozen=True)
class Benchmarks:
    """Held-out capabilities, measured in the validations of every run.

    Args:
        tasks: Names of tasks, or tasks with settings.
        limit: Only the first so many items of each task that sets no limit of its own.
        batch_size: Prompts of a batch, or rows of a context and a continuation; where several
            continuations share their context, as many as take no more tokens.
        every_n_validations: Measure in every n-th validation of a fit; besides, always before
            the first step and at the end.
        mean: alike averages the tasks' metrics where all have the same name, and refuses others;
            any averages what it gets; off logs no mean.
        data_dir: Folder that relative data files of task YAMLs are looked for in; without it, the
            folder of the YAML.
        cache_requests: Let the harness keep its requests on disk between runs
            (LM_HARNESS_CACHE_PATH). Its key knows the task's name only: not for files that change.
        allow_code_execution: Run code that the model wrote, in our sandbox, for the task files
            that use it (preset:benchmarks/humaneval).
        allow_task_code: Import and run Python code that task YAMLs of your own name (`!function`,
            metrics of `evaluate`), outside any sandbox. Only for files that you have read.
    """

    tasks: list[str | BenchmarkTask] = field(default_factory=list)
    limit: float | None = None
    batch_size: int = 32
    every_n_validations: int = 1
    mean: Mean | bool = "alike"  # YAML takes `off` for false, which therefore stands for it
    data_dir: str | None = None
    cache_requests: bool = False
    allow_code_execution: bool = False
    allow_task_code: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.mean is False:
            object.__setattr__(self, "mean", "off")  # frozen for others
        check_choice("data.benchmarks.mean", self.mean, ("alike", "any", "off"))
        for name in ("batch_size", "every_n_validations"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"data.benchmarks.{name}: got {getattr(self, name)}, allowed are 1 and more."
                )
        for task in self.named():
            if task.multiturn and not task.apply_chat_template:
                raise UserError(
                    f"data.benchmarks.tasks: {task.name}: fewshot_as_multiturn needs "
                    "apply_chat_template. Set both or neither."
                )
        limits = [self.limit, *(task.limit for task in self.named())]
        for limit in limits:
            if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
                raise UserError(
                    f"data.benchmarks.limit: got {limit}, allowed are a number of items (1 and "
                    "more) or a fraction between 0 and 1."
                )

    def named(self) -> list[BenchmarkTask]:
        """The tasks with their settings."""
        return [BenchmarkTask(task) if isinstance(task, str) else task for task in self.tasks]

    def limit_of(self, task: BenchmarkTask) -> float | None:
        """The limit of a task, as the harness takes it: an int counts items."""
        limit = self.limit if task.limit is None else task.limit
        return limit if limit is None or limit < 1 else int(limit)


def __getattr__(name: str) -> Any:
    if name == "BenchmarkSuite":
        from sdft_lightning.data.benchmarks.suite import BenchmarkSuite

        return BenchmarkSuite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
