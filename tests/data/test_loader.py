"""The order of rows: whole epochs, windows, ranks, and going on in the middle."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdft_lightning.data import DemonstrationDataModule
from sdft_lightning.data.batches import (
    EvaluationSampler,
    MicroBatch,
    PromptDataset,
    WindowSampler,
    rows_left_out,
)
from sdft_lightning.data.benchmark_data import ResumableLoader
from sdft_lightning.data.tokens import TokenizedRow
from sdft_lightning.errors import UserError
from sdft_lightning.modules import SFTModule
from sdft_lightning.types import Demonstration


def epoch(sampler: WindowSampler, number: int = 0) -> list[MicroBatch]:
    sampler.set_epoch(number)
    return list(sampler)


def indices(batches: list[MicroBatch]) -> list[list[int]]:
    return [batch.indices for batch in batches]


def test_each_row_comes_once_an_epoch_and_what_fills_no_batch_is_left_out() -> None:
    sampler = WindowSampler(14, 4, 1, seed=0, rank=0, world_size=1)
    seen = set()
    for number in range(8):
        batches = indices(epoch(sampler, number))
        flat = list(chain(*batches))
        assert [len(batch) for batch in batches] == [4, 4, 4]
        assert len(set(flat)) == 12
        assert set(flat) <= set(range(14))
        seen |= set(flat)
    assert seen == set(range(14))  # not the same rows are left out each time
    assert len(sampler) == 3


@pytest.mark.parametrize(
    ("rows", "batch_size", "world_size", "told"),
    [
        (12, 4, 1, None),
        (12, 3, 2, None),
        (
            114,
            16,
            1,
            r"2 of 114 rows fill no batch of 16 and .*batch_size to 6, or give 14 more",
        ),
        (30, 4, 2, r"6 of 30 rows fill no batch of 8 \(4 on each of 2\) .*to 3, or give 2 more"),
        (13, 4, 1, r"1 of 13 rows fill no batch of 4 and .*To use all of them, give 3 more"),
    ],
)
def test_rows_that_fill_no_batch_are_counted_with_the_remedy(
    rows: int, batch_size: int, world_size: int, told: str | None
) -> None:
    found = rows_left_out(WindowSampler(rows, batch_size, 1, 0, 0, world_size))
    assert found is None if told is None else re.search(told, found or "")


def test_rows_that_fill_no_batch_are_told_once_before_training(
    fit_module: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    fit_module(SFTModule, data={"batch_size": 5}, max_steps=5)  # more than two epochs
    assert caplog.text.count("2 of 12 rows fill no batch of 5 and are left out of each epoch") == 1
    assert caplog.text.count("fill no batch") == 1
    caplog.clear()
    fit_module(SFTModule, data={"batch_size": 4})
    assert "fill no batch" not in caplog.text


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    first, again, other = (WindowSampler(40, 4, 1, seed, 0, 1) for seed in (0, 0, 1))
    torch.manual_seed(1)
    order = indices(epoch(first, 2))
    torch.manual_seed(2)
    assert indices(epoch(again, 2)) == order
    assert indices(epoch(first, 3)) != order
    assert indices(epoch(other, 2)) != order
    # Neighbouring seeds and epochs must not be the same stream shifted by one.
    assert indices(epoch(other, 1)) != order


def test_ranks_partition_the_batch_that_one_process_would_see() -> None:
    whole = indices(epoch(WindowSampler(50, 12, 2, 5, 0, 1), 1))
    ranks = [indices(epoch(WindowSampler(50, 4, 2, 5, rank, 3), 1)) for rank in range(3)]
    assert len(whole) == 4
    for place, batch in enumerate(whole):
        parts = [rank[place] for rank in ranks]
        assert [len(part) for part in parts] == [4, 4, 4]
        assert sorted(chain(*parts)) == sorted(batch)


def test_first_batch_of_each_window_carries_the_later_ones_also_of_a_short_last_window() -> None:
    batches = epoch(WindowSampler(16, 2, 3, 0, 0, 1))
    order = indices(batches)
    assert [indices(batch.later) for batch in batches] == [
        order[1:3], [], [], order[4:6], [], [], order[7:8], [],
    ]  # fmt: skip


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7])
def test_resume_yields_exactly_the_rest_and_the_next_epoch_is_whole(start: int) -> None:
    plain = WindowSampler(16, 2, 3, 0, 0, 1)
    resumed = WindowSampler(16, 2, 3, 0, 0, 1)
    resumed.start = start
    assert epoch(resumed, 4) == epoch(plain, 4)[start:]
    assert epoch(resumed, 5) == epoch(plain, 5)
    assert len(epoch(resumed, 5)) == 8


@pytest.mark.parametrize(("rows", "world_size"), [(3, 1), (7, 2)])
def test_fewer_rows_than_a_global_batch_are_refused_with_the_largest_batch(
    rows: int, world_size: int
) -> None:
    with pytest.raises(UserError) as error:
        WindowSampler(rows, 4, 1, 0, 0, world_size)
    words = ["data.batch_size", f"{world_size} processes", f"{rows} training rows", "at most 3"]
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("rows", "world_size"), [(10, 1), (10, 3), (2, 4)])
def test_evaluation_gives_each_row_to_exactly_one_rank(rows: int, world_size: int) -> None:
    samplers = [EvaluationSampler(rows, 4, rank, world_size) for rank in range(world_size)]
    batches = [batch for sampler in samplers for batch in sampler]
    assert sorted(chain(*batches)) == list(range(rows))
    assert all(1 <= len(batch) <= 4 for batch in batches)
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


def dataset(count: int = 16) -> PromptDataset:
    rows = [
        TokenizedRow(Demonstration(str(i), [], [], None, None, ""), [i + 1], [i + 1], [i + 1])
        for i in range(count)
    ]
    return PromptDataset(rows, 0, "task", "exact")


def loader(workers: int, position: Any = lambda: (0, 0)) -> ResumableLoader:
    sampler = WindowSampler(16, 2, 3, 0, 0, 1)
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    return ResumableLoader(dataset(), sampler, position, options)


def ids(batches: ResumableLoader) -> list[list[str]]:
    return [[row.id for row in batch.rows] for batch in batches]


def test_loader_process_leaves_ctrl_c_and_a_hang_up_to_the_run() -> None:
    batches = iter(loader(1))
    next(batches)
    children = multiprocessing.active_children()
    (worker,) = (each for each in children if type(each) is multiprocessing.Process)
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(worker.pid, number)
    assert len(list(batches)) > 0
    assert worker.exitcode in (None, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_at_the_batch_that_was_used_not_at_what_workers_fetched_ahead(
    workers: int,
) -> None:
    used = (2, 0)
    first = loader(workers, lambda: used)
    first.window_sampler.set_epoch(2)
    expected = ids(first)
    first.window_sampler.set_epoch(2)
    iterator = iter(first)
    for count in range(1, 6):
        next(iterator)
        used = (2, count)
    state = first.state_dict()
    assert state == {"epoch": 2, "batches": 5}

    second = loader(workers)
    second.load_state_dict(state)
    assert ids(second) == expected[5:]
    second.window_sampler.set_epoch(3)
    first.window_sampler.set_epoch(3)
    assert ids(second) == ids(first)
    assert len(ids(second)) == 8


def test_place_at_the_end_of_an_epoch_is_the_start_of_a_whole_one() -> None:
    done = loader(0, lambda: (3, 8))
    assert done.state_dict() == {"epoch": 4, "batches": 0}


def test_items_are_collated_with_their_window_task_and_grader() -> None:
    batch = dataset()[MicroBatch([3, 1], [[5], [7, 9]])]
    assert batch.prompt_ids.tolist() == [[4], [2]]
    assert [[row.id for row in later.rows] for later in batch.window] == [["5"], ["7", "9"]]
    assert (batch.task, batch.grader) == ("task", "exact")
    assert dataset()[[0, 2]].window == []


@pytest.mark.parametrize(("stage", "split"), [("fit", "validation"), ("predict", "predict")])
def test_a_set_with_fewer_rows_than_processes_is_refused_before_the_others_wait(
    model_folder: Path, write_rows: Callable[..., Path], make_rows: Any, stage: str, split: str
) -> None:
    few = write_rows(make_rows(3), "few.jsonl")
    given = {"train": str(write_rows(make_rows(12))), split: str(few)}

    def set_up(processes: int) -> None:
        rows = DemonstrationDataModule(str(model_folder), batch_size=2, **given)  # type: ignore
        rows.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=processes, global_rank=0, accumulate_grad_batches=1, current_epoch=0
        )
        rows.setup(stage)

    set_up(3)
    expected = rf"data\.{split}: .*few\.jsonl has 3 rows for 4 processes.*--trainer\.devices"
    with pytest.raises(UserError, match=expected):
        set_up(4)
