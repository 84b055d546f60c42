"""Order of the training rows, resumable mid-epoch, and the batches that they become."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from sdft_lightning.data.tokens import TokenizedRow, stored
from sdft_lightning.errors import UserError, shown
from sdft_lightning.types import PromptBatch

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


# More processes than these prepare nothing sooner.
_MOST_WORKERS, _MOST_WORKERS_A_CORE = 32, 4


class MicroBatch(NamedTuple):
    """Indices of one micro-batch, and of the later ones of its window if it is the first."""

    indices: list[int]
    later: list[list[int]]


class PromptDataset(Dataset[PromptBatch]):
    """Tokenized rows; an index is a `MicroBatch` or a list, an item a collated batch."""

    def __init__(
        self, rows: Sequence[TokenizedRow], pad_id: int, task: str, grader: str = ""
    ) -> None:
        self.rows = stored(rows)
        self.pad_id = pad_id
        self.task = task
        self.grader = grader

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: MicroBatch | list[int]) -> PromptBatch:
        """Collate the rows of an index."""
        if isinstance(index, MicroBatch):
            window = [self._collate(later) for later in index.later]
            return self._collate(index.indices)._replace(window=window)
        return self._collate(index)

    def _collate(self, indices: list[int]) -> PromptBatch:
        return collate([self.rows[i] for i in indices], self.pad_id, self.task, self.grader)


class WindowSampler(DistributedSampler[Any]):
    """Micro-batches of shuffled rows for one rank.

    A `DistributedSampler`, so that Lightning leaves it in place and tells it the epoch. The
    order depends on (seed, epoch) only; a micro-batch of rank r of W is every W-th row of the
    global one. Rows that do not fill a global micro-batch are left out of that epoch.

    Args:
        size: Number of rows.
        batch_size: Rows of a micro-batch on one rank.
        window: Micro-batches of an accumulation window.
        seed: Seed of the order.
        rank: Index of this process.
        world_size: Number of processes.
        current_epoch: The epoch under way, where somebody knows better than who calls `set_epoch`.

    Raises:
        UserError: If there are fewer rows than one global micro-batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        window: int,
        seed: int,
        rank: int,
        world_size: int,
        current_epoch: Callable[[], int] | None = None,
    ) -> None:
        # Not the parent's constructor: it would ask for a process group and a data set.
        self.size = size
        self.batch_size = batch_size
        self.window = window
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.current_epoch = current_epoch
        self.epoch = 0
        self.start = 0
        self.count = size // (batch_size * world_size)
        if self.count == 0:
            most = size // world_size
            remedy = f"--data.batch_size to at most {most}" if most else "a lower --trainer.devices"
            raise UserError(
                f"data.batch_size: {batch_size} rows x {world_size} processes are more than the "
                f"{size} training rows. Set {remedy}."
            )

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch.

        Lightning calls it with a number that is one too high from where a run was resumed at the
        end of an epoch: it counts that epoch as processed once more.
        """
        self.epoch = epoch if self.current_epoch is None else self.current_epoch()

    def __len__(self) -> int:
        """Micro-batches of an epoch, on each rank."""
        return self.count

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches of this epoch, from `start` on; the next epoch starts at 0."""
        start, self.start = self.start, 0
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        order = torch.randperm(self.size, generator=generator).tolist()
        total = self.batch_size * self.world_size
        batches = [
            order[i * total : (i + 1) * total][self.rank :: self.world_size]
            for i in range(self.count)
        ]
        for i in range(start, self.count):
            first = i % self.window == 0
            later = batches[i + 1 : i - i % self.window + self.window] if first else []
            yield MicroBatch(batches[i], later)


def rows_left_out(rows: int, batch_size: int, world_size: int) -> str | None:
    """What to tell of training rows that fill no batch.

    Args:
        rows: How many fit; at least one batch of all processes.
        batch_size: Rows of a micro-batch on one process.
        world_size: Number of processes.

    Returns:
        A sentence with the remedy, or None where all rows are used.
    """
    batch = batch_size * world_size
    left = rows % batch
    if left == 0:
        return None
    of = f"{batch}" if world_size == 1 else f"{batch} ({batch_size} on each of {world_size})"
    sizes = [size for size in range(batch_size, 1, -1) if rows % (size * world_size) == 0]
    fits = f"set --data.batch_size to {sizes[0]}, or " if sizes else ""
    return (
        f"data.train: {left} of {rows} rows fill no batch of {of} and are left out of each epoch, "
        f"other rows in each. To use all of them, {fits}give {batch - left} more."
    )


class EvaluationSampler(DistributedSampler[Any]):
    """Batches of rows in order, each row on exactly one rank.

    Args:
        size: Number of rows.
        batch_size: Rows of a batch.
        rank: Index of this process.
        world_size: Number of processes.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int) -> None:
        # Not the parent's constructor, as in `WindowSampler`.
        mine = range(rank, size, world_size)
        self.batches = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
        self.epoch = 0

    def __len__(self) -> int:
        """Batches on this rank."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches."""
        return iter(self.batches)


def check_rows_for_all(option: str, source: object, rows: int, world_size: int) -> None:
    """Refuse a set of which some processes would evaluate nothing: the others would wait for them.

    Args:
        option: Name of the option, e.g. data.validation.
        source: The file, or where else the rows are from.
        rows: How many fit.
        world_size: Number of processes.

    Raises:
        UserError: If there are fewer rows than processes.
    """
    if rows < world_size:
        raise UserError(
            f"{option}: {source} has {rows} rows for {world_size} processes; allowed is at least "
            "one row for each. Give more rows, or fewer processes with --trainer.devices."
        )


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


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to the longest.

    Args:
        rows: B rows.
        pad_id: What fills them up; it may also be a real token, the mask tells them apart.
        side: Where the padding goes.

    Returns:
        Ids `(B, L)` and their mask `(B, L)`.
    """
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)  # (B, L)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)  # (B, L)
    for place, row in enumerate(rows):
        columns = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[place, columns] = torch.tensor(row, dtype=torch.long)
        mask[place, columns] = True
    return ids, mask


def collate(
    rows: Sequence[TokenizedRow],
    pad_id: int,
    task: str,
    grader: str = "",
    window: Sequence[PromptBatch] = (),
) -> PromptBatch:
    """Make a batch of rows.

    Args:
        rows: B rows.
        pad_id: Padding id.
        task: Name of the data set.
        grader: Name of its grader; empty for none.
        window: The later micro-batches of the accumulation window, on its first.

    Returns:
        The batch; a row without demonstration has a teacher prompt of no tokens.
    """
    prompt_ids, prompt_mask = pad([row.prompt_ids for row in rows], pad_id, "left")
    teacher_ids, teacher_mask = pad([row.teacher_prompt_ids for row in rows], pad_id, "left")
    target_ids, target_mask = pad([row.demonstration_ids for row in rows], pad_id, "right")
    context_ids, context_mask = pad([row.context_ids for row in rows], pad_id, "right")
    return PromptBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        teacher_prompt_ids=teacher_ids,
        teacher_prompt_mask=teacher_mask,
        demonstration_ids=target_ids,
        demonstration_mask=target_mask,
        context_ids=context_ids,
        context_mask=context_mask,
        rows=[row.row for row in rows],
        task=task,
        grader=grader,
        window=list(window),
    )
