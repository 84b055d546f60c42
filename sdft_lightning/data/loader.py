"""Processes that prepare batches: how many, what ends them, and where a resumed run goes on."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from sdft_lightning.data.batches import PromptDataset, WindowSampler
from sdft_lightning.errors import UserError, shown

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
