"""Rows to retain stand beside the demonstrations, in every batch, in order, on any machine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.data import Columns, DemonstrationDataModule
from sdft_lightning.data.batches import MicroBatch, Retained, WindowSampler
from sdft_lightning.errors import UserError


def epoch(sampler: WindowSampler, number: int = 0) -> list[MicroBatch]:
    sampler.set_epoch(number)
    return list(sampler)


def parts(batches: Sequence[MicroBatch]) -> list[tuple[list[int], list[int]]]:
    return [(batch.indices, list(batch.retained)) for batch in batches]


def sampler(rank: int = 0, world_size: int = 1, size: int = 50, **options: Any) -> WindowSampler:
    of = {"batch_size": 12 // world_size, "window": 1, "seed": 3, "rank": rank, **options}
    share = of.pop("share", 1 / 3)
    return WindowSampler(size, **of, world_size=world_size, retained=Retained(7, share))


@pytest.mark.parametrize(
    ("share", "batch_size", "counts"),
    [(1 / 3, 3, [1, 1, 1]), (1 / 3, 4, [2, 1, 1]), (0.5, 8, [4, 4, 4]), (0.2, 4, [1, 1, 1])],
)
def test_batches_keep_their_size_and_the_share_is_met(
    share: float, batch_size: int, counts: list[int]
) -> None:
    batches = epoch(sampler(batch_size=batch_size, share=share, size=200))
    assert [len(batch.retained) for batch in batches[:3]] == counts
    assert {len(batch.indices) + len(batch.retained) for batch in batches} == {batch_size}
    retained = sum(len(batch.retained) for batch in batches)
    assert abs(retained - share * batch_size * len(batches)) < 1


def test_each_training_row_comes_at_most_once_an_epoch_and_no_batch_is_missing() -> None:
    found = sampler(size=50)  # 8 of 12 are demonstrations
    rows = list(chain(*(batch.indices for batch in epoch(found))))
    assert len(rows) == len(set(rows)) == 48
    assert (len(found), found.left_out) == (6, 2)


def test_all_rows_to_retain_are_used_before_one_comes_again_over_epochs_too() -> None:
    found = sampler()
    used = [row for number in range(3) for batch in epoch(found, number) for row in batch.retained]
    turns = [used[i : i + 7] for i in range(0, len(used) - 6, 7)]
    assert len(turns) == 10
    assert all(Counter(turn) == Counter(range(7)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 5


def test_ranks_share_the_batch_that_one_process_would_see() -> None:
    whole = epoch(sampler(), 1)
    ranks = [epoch(sampler(rank, 3), 1) for rank in range(3)]
    for place, batch in enumerate(whole):
        parts = [rank[place] for rank in ranks]
        assert sorted(chain(*(part.indices for part in parts))) == sorted(batch.indices)
        assert sorted(chain(*(part.retained for part in parts))) == sorted(batch.retained)
        assert {len(part.indices) + len(part.retained) for part in parts} == {4}


def test_a_run_that_goes_on_in_an_epoch_gets_the_same_batches_and_windows() -> None:
    whole = epoch(sampler(window=2), 2)
    resumed = sampler(window=2)
    resumed.start = 3
    assert parts(epoch(resumed, 2)) == parts(whole[3:])
    assert parts(whole[0].later) == parts(whole[1:2])
    assert whole[0].later[0].retained


@pytest.mark.parametrize(
    ("share", "batch_size", "said"),
    [
        (0.99999, 8, r"leaves 0 demonstrations .*Raise --data\.batch_size, or lower the share\."),
        (0.001, 1, r"leaves 0 demonstrations .*Raise --data\.batch_size\."),
    ],
)
def test_batches_without_room_for_a_demonstration_are_refused(
    share: float, batch_size: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        sampler(batch_size=batch_size, share=share)


def test_without_a_share_the_order_is_that_of_a_run_without_rows_to_retain() -> None:
    plain = WindowSampler(50, 12, 2, 3, 0, 1)
    assert epoch(plain, 4) == epoch(WindowSampler(50, 12, 2, 3, 0, 1, None, Retained()), 4)
    assert all(not batch.retained for batch in epoch(plain))


@pytest.fixture
def retain_file(tmp_path: Path) -> Path:
    path = tmp_path / "retain.jsonl"
    rows = [{"prompt": f"Tell me of the number {i}."} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_data(model_folder: Path, train_file: Path) -> Callable[..., DemonstrationDataModule]:
    def make(**options: Any) -> DemonstrationDataModule:
        given = {"train": str(train_file), **options}
        return DemonstrationDataModule(str(model_folder), **given)

    return make


def test_the_module_serves_bare_prompts_beside_the_demonstrations(
    make_data: Callable[..., DemonstrationDataModule], retain_file: Path
) -> None:
    data = make_data(batch_size=4, retain=str(retain_file), retain_share=0.25)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert len(batch.rows) == 3
    assert batch.retained is not None
    assert [row.id.startswith("retain/") for row in batch.retained.rows] == [True]
    assert batch.retained.prompt_mask.any()
    assert not batch.retained.teacher_prompt_mask.any()
    assert not batch.retained.demonstration_mask.any()
    assert data.retained_new_tokens == 512
    assert {row.id for row in data.training_rows()}.isdisjoint(
        {row.id for row in batch.retained.rows}
    )


def test_nothing_is_read_where_the_share_is_none(
    make_data: Callable[..., DemonstrationDataModule],
) -> None:
    data = make_data(retain="not/there.jsonl", retain_share=0.0)
    data.setup("fit")
    assert data.retained_new_tokens == 0
    assert all(batch.retained is None for batch in data.train_dataloader())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"retain_share": 1.0}, "data.retain_share: got 1.0, allowed are 0 and more, below 1"),
        ({"retain_share": -0.1}, "data.retain_share: got -0.1"),
        ({"retain_max_new_tokens": 0}, "data.retain_max_new_tokens: got 0"),
        ({"retain_max_new_tokens": 2**21}, "retain_max_new_tokens: got 2097152, .*at most 1048576"),
    ],
)
def test_options_out_of_range_are_refused(
    make_data: Callable[..., DemonstrationDataModule], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        make_data(**options)


def test_prompts_have_a_column_of_their_own(
    make_data: Callable[..., DemonstrationDataModule], retain_file: Path, tmp_path: Path
) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"question": "Who?", "demonstration": "I."}) + "\n")
    columns = Columns(prompt="question")
    options = {"batch_size": 2, "retain_share": 0.5, "columns": columns, "train": str(train)}
    data = make_data(retain=str(retain_file), **options)
    data.setup("fit")
    assert data.retained_new_tokens == 512
    with pytest.raises(UserError, match=r"data\.retain: .*no column 'prompt'.* question"):
        make_data(retain=str(train), **options).setup("fit")


@pytest.mark.parametrize(
    ("batch_size", "share", "even"), [(100, 0.29, True), (25, 0.28, True), (4, 1 / 3, False)]
)
def test_whether_all_processes_have_as_many(
    make_data: Callable[..., DemonstrationDataModule], batch_size: int, share: float, even: bool
) -> None:
    assert make_data(batch_size=batch_size, retain_share=share).retains_evenly is even


def test_a_source_that_is_not_there_names_the_option(
    make_data: Callable[..., DemonstrationDataModule],
) -> None:
    with pytest.raises(UserError, match=r"data\.retain: .*not/there"):
        make_data(retain="not/there.jsonl").setup("fit")
