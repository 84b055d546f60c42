"""What the data modules share, loaders among it, and held-out capabilities as one of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch.utils.data import DataLoader, Dataset

from sdft_lightning.data.batches import EvaluationSampler, PromptDataset, WindowSampler
from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite
from sdft_lightning.errors import UserError, check_at_least, show_messages, shown
from sdft_lightning.models.tokenization import load_tokenizer, resolve_model
from sdft_lightning.types import TaskData

# More processes than these prepare nothing sooner.
_MOST_WORKERS, _MOST_WORKERS_A_CORE = 32, 4


_PR_SET_PDEATHSIG = 1


def start_worker(parent: int, dies_with_parent: bool, worker: int) -> None:
    """Leave Ctrl-C and a hang-up to the run, which ends its workers; end where the run is killed.

    Args:
        parent: The run's process.
        dies_with_parent: Let the system end this process with its parent, rather than torch some
            seconds later. Linux does so when the parent's *thread* ends that started it.
        worker: Number of the process; not needed.
    """
    # A terminal sends both to all its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if dies_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # which was killed before
            os._exit(1)


def check_workers(count: int) -> None:
    """Refuse more processes than could help: each takes memory, and what they share runs out.

    Args:
        count: Processes that collate batches.

    Raises:
        UserError: If there are many more than this machine has cores.
    """
    cores = os.cpu_count() or 1
    most = max(_MOST_WORKERS, _MOST_WORKERS_A_CORE * cores)
    if count > most:
        raise UserError(
            f"data.num_workers: got {count}, allowed are at most {most} on {cores} cores. "
            "Rows are tokenized before the run, so that 0 to 4 are enough."
        )


class TellingLoader(DataLoader[Any]):
    """A loader that says what it means when one of its processes has died.

    Its processes leave signals to the run, and end with it.

    Args:
        dataset: The rows.
        options: Further arguments of `DataLoader`.
    """

    def __init__(self, dataset: Dataset[Any], **options: Any) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        options.setdefault("worker_init_fn", partial(start_worker, os.getpid(), in_main))
        super().__init__(dataset, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches.

        Raises:
            UserError: If a process that prepares them has died.
        """
        try:
            yield from super().__iter__()
        except (RuntimeError, ConnectionError, EOFError) as error:
            told = dead_worker(error)
            if self.num_workers == 0 or told is None:
                raise
            raise told from error


def dead_worker(error: BaseException) -> UserError | None:
    """What to tell the user of an error that the death of a loader process brings about.

    Args:
        error: Raised while batches were fetched. torch names its own; the others come from
            connections whose other end is gone.

    Returns:
        The error with its remedy, or None if it is another.
    """
    gone = isinstance(error, ConnectionError | EOFError)
    if not gone and not str(error).startswith("DataLoader worker"):
        return None
    return UserError(
        f"data.num_workers: a process that prepares batches has died ({shown(error)}). Most often "
        "the machine ran out of memory, or of shared memory (/dev/shm). Give --data.num_workers=0, "
        "and go on with --ckpt_path=last."
    )


class ResumableLoader(TellingLoader):
    """A loader that Lightning saves and restores with its place in the epoch.

    Args:
        dataset: The rows.
        sampler: Their order.
        position: Returns (epoch, micro-batches used in it). What workers fetched ahead does not
            count as used.
        options: Further arguments of `DataLoader`.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        sampler: WindowSampler,
        position: Callable[[], tuple[int, int]],
        options: dict[str, Any],
    ) -> None:
        super().__init__(dataset, batch_size=None, sampler=sampler, **options)
        self.window_sampler = sampler
        self.position = position

    def state_dict(self) -> dict[str, int]:
        """The place at which a resumed run goes on."""
        epoch, batches = self.position()
        at_end = batches >= len(self.window_sampler)
        return {"epoch": epoch + at_end, "batches": 0 if at_end else batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved place."""
        self.window_sampler.epoch = state["epoch"]
        self.window_sampler.start = state["batches"]


class ModelVersion(NamedTuple):
    """A model, and its branch, tag or commit on the Hub."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        """The name, and the revision where there is one."""
        return self.name if self.revision is None else f"{self.name} at revision {self.revision}"


class ModelDataModule(L.LightningDataModule, TaskData):
    """Texts that are tokenized for one model.

    Args:
        model_name: The model whose tokenizer is used; that of the trainer's module without it.
        revision: Its branch, tag or commit on the Hub; the module's without it.
        num_workers: Processes that collate batches.
    """

    def __init__(self, model_name: str | None, revision: str | None, num_workers: int) -> None:
        super().__init__()
        show_messages()
        check_at_least("data.num_workers", num_workers, 0)
        check_workers(num_workers)
        self.model_name = model_name
        self.revision = revision
        self.num_workers = num_workers

    def prepare_data(self) -> None:
        """Fetch the tokenizer into the cache (for the embedded model: the model).

        Raises:
            UserError: If this is not the model of the trainer's module, or there is none.
        """
        load_tokenizer(*self.model_version)

    @property
    def model_version(self) -> ModelVersion:
        """Whose tokenizer is used: the module's model, which an own name may only repeat.

        Raises:
            UserError: If the module has another model, or neither of them names one.
        """
        module = getattr(self.trainer, "lightning_module", None)
        policy = getattr(module, "policy", None)
        if policy is None:
            if self.model_name is None:
                raise UserError(
                    "data.model_name: not given, and there is no module to take it from. Name the "
                    f"model that is used, {type(self).__name__}(model_name=...), or give the "
                    "data module to a Trainer with such a module."
                )
            return ModelVersion(self.model_name, self.revision)
        version = ModelVersion(policy.name, policy.revision)
        same_name = self.model_name is None or _is_same_model(self.model_name, version.name)
        if not same_name or self.revision not in (None, version.revision):
            own = ModelVersion(self.model_name or version.name, self.revision)
            raise UserError(
                f"data.model_name: the data module has {own}, and the module that is trained has "
                f"{version}: rows would be tokenized for another model. Leave model_name and "
                "revision out of the data module, which then takes the module's."
            )
        return version

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def evaluation_loader(
        self, rows: Any, batch_size: int, at_least_one: bool = False
    ) -> DataLoader[Any]:
        """Batches of rows in order, each row on exactly one process.

        Args:
            rows: A data set whose index is a list of places, and whose item is a batch.
            batch_size: Rows of a batch.
            at_least_one: Give each process a batch, though it be of a place behind the last row.
        """
        sampler = EvaluationSampler(
            max(len(rows), self._world_size) if at_least_one else len(rows),
            batch_size,
            self.trainer.global_rank if self.trainer else 0,
            self._world_size,
        )
        return TellingLoader(rows, batch_size=None, sampler=sampler, num_workers=self.num_workers)


def _is_same_model(one: str, other: str) -> bool:
    """Whether two names stand for the same model; a folder may be named by several paths."""
    if one == other:
        return True
    paths = [Path(resolve_model(name)) for name in (one, other)]
    return all(path.is_dir() for path in paths) and paths[0].samefile(paths[1])


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
