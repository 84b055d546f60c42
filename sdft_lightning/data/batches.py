"""Order of the training rows, resumable mid-epoch, and the batches that they become."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from sdft_lightning.data.tokens import TokenizedRow, stored
from sdft_lightning.errors import UserError
from sdft_lightning.types import PromptBatch

# What tells the order of rows to retain from that of the others.
_RETAINED = 1


class MicroBatch(NamedTuple):
    """Indices of one micro-batch, and the later ones of its window if it is the first.

    Attributes:
        indices: Of the training rows.
        later: The later micro-batches.
        retained: Of the rows to retain.
    """

    indices: list[int]
    later: Sequence[MicroBatch] = ()
    retained: Sequence[int] = ()


class PromptDataset(Dataset[PromptBatch]):
    """Tokenized rows; an index is a `MicroBatch` or a list, an item a collated batch.

    Args:
        rows: The rows.
        pad_id: Padding id.
        task: Name of the data set.
        grader: Name of its grader; empty for none.
        retained: The rows to retain that `MicroBatch.retained` counts.
    """

    def __init__(
        self,
        rows: Sequence[TokenizedRow],
        pad_id: int,
        task: str,
        grader: str = "",
        retained: PromptDataset | None = None,
    ) -> None:
        self.rows = stored(rows)
        self.pad_id = pad_id
        self.task = task
        self.grader = grader
        self.retained = retained

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: MicroBatch | list[int]) -> PromptBatch:
        """Collate the rows of an index."""
        if not isinstance(index, MicroBatch):
            return self._collate(index)
        batch = self._collate(index.indices)
        if self.retained is not None and index.retained:
            batch = batch._replace(retained=self.retained[list(index.retained)])
        return batch._replace(window=[self[later] for later in index.later])

    def _collate(self, indices: list[int]) -> PromptBatch:
        return collate([self.rows[i] for i in indices], self.pad_id, self.task, self.grader)


class Retained(NamedTuple):
    """How many rows there are to retain, and their part of every batch.

    Attributes:
        size: Number of rows.
        share: Their part, at least 0 and below 1.
    """

    size: int = 0
    share: float = 0.0

    def before(self, batch: int, total: int) -> int:
        """How many stand in the batches of an epoch before one of that number.

        Args:
            batch: Number of the batch, from 0.
            total: Rows of a batch, on all processes together.
        """
        return math.ceil(batch * total * self.exact_share) if self.size else 0

    @property
    def exact_share(self) -> Fraction:
        """The share as a fraction, so that a third of 9 is 3."""
        return Fraction(self.share).limit_denominator(10_000)


class WindowSampler(DistributedSampler[Any]):
    """Micro-batches of shuffled rows for one rank.

    A `DistributedSampler`, so that Lightning leaves it in place and tells it the epoch. The
    order depends on (seed, epoch) only; a micro-batch of rank r of W is every W-th row of the
    global one. Rows that do not fill a global micro-batch are left out of that epoch. Rows to
    retain stand behind the others in a global micro-batch; they begin anew, in another order, when
    all have been used, whatever the epoch.

    Args:
        size: Number of rows.
        batch_size: Rows of a micro-batch on one rank.
        window: Micro-batches of an accumulation window.
        seed: Seed of the order.
        rank: Index of this process.
        world_size: Number of processes.
        current_epoch: The epoch under way, where somebody knows better than who calls `set_epoch`.
        retained: The rows to retain beside them.

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
        retained: Retained = Retained(),  # noqa: B008 - a tuple
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
        self.retained = retained
        self._turn: tuple[int, list[int]] | None = None  # of the rows to retain, and their order
        self.count = size // (batch_size * world_size)
        if retained.size:
            self._check_taught()
            while self._taught_before(self.count + 1) <= size:
                self.count += 1
        if self.count == 0:
            most = size // world_size
            remedy = f"--data.batch_size to at most {most}" if most else "a lower --trainer.devices"
            raise UserError(
                f"data.batch_size: {batch_size} rows x {world_size} processes are more than the "
                f"{size} training rows. Set {remedy}."
            )

    def _check_taught(self) -> None:
        total = self._total
        fewest = total - math.ceil(total * self.retained.exact_share)
        if fewest < self.world_size:
            lower = ", or lower the share" if total > self.world_size else ""
            raise UserError(
                f"data.retain_share: {self.retained.share:g} of batches of {total} rows leaves "
                f"{fewest} demonstrations for {self.world_size} processes in some; each needs one. "
                f"Raise --data.batch_size{lower}."
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
        order = shuffled(self.size, [self.seed, self.epoch])
        batches = [self._mine(i, order) for i in range(self.count)]
        for i in range(start, self.count):
            first = i % self.window == 0
            later = batches[i + 1 : i - i % self.window + self.window] if first else []
            yield batches[i]._replace(later=later)

    @property
    def _total(self) -> int:
        return self.batch_size * self.world_size

    @property
    def left_out(self) -> int:
        """Rows of an epoch that fill no batch."""
        return self.size - self._taught_before(self.count)

    def _taught_before(self, batch: int) -> int:
        return batch * self._total - self.retained.before(batch, self._total)

    def _mine(self, batch: int, order: list[int]) -> MicroBatch:
        """This rank's part of a global micro-batch."""
        taught = order[self._taught_before(batch) : self._taught_before(batch + 1)]
        begin, end = (self.retained.before(batch + more, self._total) for more in (0, 1))
        used = self.epoch * self.retained.before(self.count, self._total)
        retained = [self._retained_row(used + place) for place in range(begin, end)]
        both = [*((0, row) for row in taught), *((1, row) for row in retained)]
        mine = both[self.rank :: self.world_size]
        return MicroBatch(
            [row for kind, row in mine if kind == 0], (), [row for kind, row in mine if kind == 1]
        )

    def _retained_row(self, place: int) -> int:
        """The row to retain at a place of the order that goes through all epochs."""
        turn, place = divmod(place, self.retained.size)
        if self._turn is None or self._turn[0] != turn:
            self._turn = turn, shuffled(self.retained.size, [self.seed, turn, _RETAINED])
        return self._turn[1][place]


def shuffled(size: int, entropy: Sequence[int]) -> list[int]:
    """The numbers below `size` in an order that depends on `entropy` only."""
    state = np.random.SeedSequence(list(entropy)).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def rows_left_out(sampler: WindowSampler) -> str | None:
    """What to tell of training rows that fill no batch.

    Args:
        sampler: Of the rows that fit.

    Returns:
        A sentence with the remedy, or None where all rows are used.
    """
    rows, batch_size, world_size = sampler.size, sampler.batch_size, sampler.world_size
    batch, left = batch_size * world_size, sampler.left_out
    if left == 0:
        return None
    of = f"{batch}" if world_size == 1 else f"{batch} ({batch_size} on each of {world_size})"
    if sampler.retained.size:
        return (
            f"data.train: {left} of {rows} rows fill no batch of {of} beside the rows to retain "
            "and are left out of each epoch, other rows in each."
        )
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
