"""Held-out capabilities as a LightningDataModule."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite
from sdft_lightning.data.model_data import ModelDataModule, ModelVersion
from sdft_lightning.errors import UserError


class BenchmarkDataModule(ModelDataModule):
    """Held-out capabilities alone: what a model can do, without any rows of a task.

    Args:
        model_name: The model whose tokenizer is used; that of the module that is measured without
            it. The command line sets it from model.policy.name.
        revision: Its branch, tag or commit on the Hub; the module's without it.
        benchmarks: Tasks of lm-evaluation-harness, which `validate` and `test` measure.
        num_workers: Processes that collate batches.

    Attributes:
        benchmark_suite: The tasks with their requests; None before `load`, and without tasks.
    """

    def __init__(
        self,
        model_name: str | None = None,
        revision: str | None = None,
        benchmarks: Benchmarks = Benchmarks(),  # noqa: B008 - frozen
        num_workers: int = 0,
    ) -> None:
        super().__init__(model_name, revision, num_workers)
        self.benchmarks = benchmarks
        self.benchmark_suite: BenchmarkSuite | None = None
        self._loaded_for: ModelVersion | None = None

    def setup(self, stage: str) -> None:
        """Load the tasks and make their requests.

        Args:
            stage: validate or test.

        Raises:
            UserError: If the stage needs rows, there are no tasks, or one cannot be loaded.
        """
        stage = getattr(stage, "value", stage)  # Lightning passes an enum
        if stage not in ("validate", "test"):
            raise UserError(
                f"data: BenchmarkDataModule holds benchmarks alone, for `validate` and `test`; "
                f"`{stage}` needs rows of a task. Use DemonstrationDataModule "
                "(--data=DemonstrationDataModule), whose option `benchmarks` measures the same."
            )
        if not self.benchmarks.tasks:
            raise UserError(
                "data.benchmarks.tasks: got none, and BenchmarkDataModule measures nothing else. "
                "Name tasks of lm-evaluation-harness or task YAMLs, e.g. "
                "--data.benchmarks.tasks='[hellaswag]'."
            )
        self.load(stage)

    def load(self, stage: str) -> None:
        """Load the tasks for the model that is measured; without tasks nothing is done.

        Args:
            stage: fit, validate or test.

        Raises:
            UserError: If a task cannot be loaded, or not all of its batches would be measured.
        """
        version = self.model_version
        if version != self._loaded_for:
            self.benchmark_suite, self._loaded_for = None, version
        if self.benchmarks.tasks and self.benchmark_suite is None:
            self._check_all_batches(stage)
            self.benchmark_suite = BenchmarkSuite(self.benchmarks, *version)

    def _check_all_batches(self, stage: str) -> None:
        name = "limit_test_batches" if stage == "test" else "limit_val_batches"
        limit = getattr(self.trainer, name, 1.0)
        if limit not in (0, 1.0) or (isinstance(limit, int) and limit == 1):
            raise UserError(
                f"trainer.{name}: got {limit}, and benchmarks need all of their requests answered. "
                "Leave it at 1.0 and use data.benchmarks.limit, or set data.benchmarks.tasks to []."
            )

    def graded(self, command: str) -> dict[str, bool]:
        """The tasks whose answers a command grades: none, the harness measures the benchmarks.

        Args:
            command: validate or test.
        """
        return {}

    def loaders(self) -> list[DataLoader[Any]]:
        """One loader of all requests, after `load`; none without tasks."""
        if self.benchmark_suite is None:
            return []
        # A process without a batch would leave the others waiting.
        return [self.evaluation_loader(self.benchmark_suite.dataset, 1, at_least_one=True)]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The requests of all tasks."""
        return self.loaders()

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The requests of all tasks."""
        return self.loaders()
