"""What is compared with the base: on rank zero, told to all; the same items only."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdft_lightning.errors import UserError
from sdft_lightning.files.run_folder import ItemKey, MeasuredItems, append_items
from sdft_lightning.modules.capability import PairedTrack
from sdft_lightning.types import Items

KEY = ItemKey("task", "clinic", "accuracy")
TWO_RANKS = """
import json, sys
from types import SimpleNamespace
from torch import distributed
from sdft_lightning.errors import UserError
from sdft_lightning.files.run_folder import ItemKey
from sdft_lightning.modules.capability import PairedTrack, of_all_ranks
from sdft_lightning.types import Items

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
mine = [("a", 0.0), ("b", 1.0)] if rank == 0 else [("c", 0.0)]
measured = {ItemKey("task", "clinic", "accuracy"): Items(dict(of_all_ranks(mine)), "same")}
# The folder of the run is there for rank zero only.
trainer = SimpleNamespace(global_step=2, default_root_dir=folder if rank == 0 else "/nowhere")
found = PairedTrack().compare(measured, trainer, in_fit=True)
broken = PairedTrack(f"{folder}/broken.jsonl")
try:
    broken.compare(measured, trainer, in_fit=True)
except UserError as error:
    print(json.dumps([found, str(error)]))
"""


def items(content: str = "same", **scores: float) -> Items:
    return Items(scores, content)


def trainer(folder: Path, step: int = 2) -> Any:
    return SimpleNamespace(global_step=step, default_root_dir=str(folder))


def write(folder: Path, step: int, command: str, measured: Items) -> None:
    append_items(folder, "validation", [MeasuredItems(command, step, KEY, measured)])


def test_two_ranks_get_what_rank_zero_reads_and_its_errors(tmp_path: Path) -> None:
    write(tmp_path, 0, "fit", items(a=1.0, b=1.0, c=1.0))
    (tmp_path / "broken.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "ranks.py").write_text(TWO_RANKS, encoding="utf-8")
    processes = [
        subprocess.Popen(
            [sys.executable, "ranks.py", str(rank), str(tmp_path)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(output) for output, _ in outputs)
    assert first == second
    found, message = first
    name = "clinic/accuracy"
    assert found == {f"{name}/lost": 2.0, f"{name}/gained": 0.0, f"{name}/p": 0.5}
    assert "broken.jsonl, line 1 holds no scores of items" in message


def test_the_base_is_the_first_measurement_of_a_fit_before_its_first_step(tmp_path: Path) -> None:
    write(tmp_path, 0, "validate", items(a=0.0, b=0.0))
    write(tmp_path, 2, "fit", items(a=0.0, b=0.0))
    write(tmp_path, 0, "fit", items(a=1.0, b=0.0))
    write(tmp_path, 0, "fit", items(a=0.0, b=0.0))
    now = {KEY: items(a=0.0, b=1.0)}
    for folder in (tmp_path, tmp_path / "validate-3"):
        found = PairedTrack().compare(now, trainer(folder, step=0), in_fit=False)
        assert found == {
            "clinic/accuracy/lost": 1.0,
            "clinic/accuracy/gained": 1.0,
            "clinic/accuracy/p": 1.0,
        }


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (items("other", a=1.0, b=0.0), "other items of clinic/accuracy"),
        (items(a=1.0), "other items of clinic/accuracy"),
        (items(a=1.0, c=0.0), "other items of clinic/accuracy"),
    ],
    ids=["other content", "fewer", "other ids"],
)
def test_other_items_are_not_compared_and_that_is_told_once(
    now: Items, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 0, "fit", items(a=1.0, b=0.0))
    track = PairedTrack()
    with caplog.at_level(logging.INFO, "sdft_lightning.modules.capability"):
        for _ in range(2):
            assert track.compare({KEY: now}, trainer(tmp_path), in_fit=True) == {}
    (record,) = caplog.records
    assert why in record.message
    assert "model.evaluation.compare_with names what to compare with" in record.message


def test_a_measurement_without_any_verdict_is_not_compared(tmp_path: Path) -> None:
    write(tmp_path, 0, "fit", items(a=float("nan"), b=1.0))
    now = {KEY: items(a=1.0, b=float("nan"))}
    assert PairedTrack().compare(now, trainer(tmp_path), in_fit=True) == {}


def test_what_a_fit_measures_first_is_its_base_and_what_is_named_goes_before(
    tmp_path: Path,
) -> None:
    named = tmp_path / "named"
    write(named, 4, "fit", items(a=0.0, b=0.0))
    first, second = {KEY: items(a=1.0, b=1.0)}, {KEY: items(a=1.0, b=0.0)}
    own, other = PairedTrack(), PairedTrack(str(named))
    for track, lost_gained in ((own, [(0, 0), (1, 0)]), (other, [(0, 2), (0, 1)])):
        for step, (measured, wanted) in enumerate(zip((first, second), lost_gained, strict=True)):
            found = track.compare(measured, trainer(tmp_path, step), in_fit=True)
            got = found["clinic/accuracy/lost"], found["clinic/accuracy/gained"]
            assert got == wanted


def test_a_named_file_without_measurements_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "item_scores.jsonl"
    path.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"compare_with: .*is empty: nothing was measured"):
        PairedTrack(str(tmp_path)).named_base()
