"""The second notebook: it explains what a run logs, and reads any run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a kernel imports everything anew, on a busy machine slowly
]
Execute = Callable[..., Any]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_reading_a_run_explains_all_that_it_logs_and_agrees_with_tensorboard(
    execute: Execute, is_explained: Callable[[str], bool]
) -> None:
    keep = ["run", "logged", "training", "validations", "sampled", "scalars", "signs", "sketched"]
    left = execute("02_read_a_run.ipynb", [*keep, "vocabulary"])
    (work,) = left.folders
    assert Path(left["run"]) == work / "run"
    assert [name for name in left["logged"] if not is_explained(_without_task(name))] == []
    assert {"val/drift/general", "val/task/library/teacher_accuracy"} <= set(left["logged"])
    assert [line["step"] for line in left["validations"]] == [1, 2]

    first, second = left["training"]
    for name in ("loss", "kl", "student_entropy", "distinct_2", "truncated_fraction"):
        values = [value for _, value in left["scalars"][f"train/{name}"]]
        assert values == pytest.approx([first[f"train/{name}"], second[f"train/{name}"]])
    # As the text says: both are means over completions of the mean over their tokens.
    tokens = [line["divergence"] for line in left["sampled"] if line["step"] == 1]
    assert len(tokens) == 4
    means = [sum(each) / len(each) for each in tokens]
    assert first["train/loss"] == pytest.approx(sum(means) / 4, abs=1e-3)
    assert first["train/kl"] == pytest.approx(sum(means) / 4, abs=1e-3)

    assert left["vocabulary"] == 272
    last = {trouble: set(found["20"]) for trouble, found in left["sketched"].items()}
    assert last == {
        "collapse": {"repetition", "truncation", "entropy"},
        "truncation": {"truncation"},
        # It is sketched with a student that is undecided, too.
        "uniform teacher": {"student_uniform", "teacher_uniform"},
    }
    assert all("1" not in found for found in left["sketched"].values())
    assert left.pictures == 1 + 1 + 3  # curves, divergence strip, invented troubles


def _without_task(name: str) -> str:
    """`val/task/library/accuracy` as the text has it."""
    return re.sub(r"^val/(task|drift)/(library|general)", r"val/\1/<name>", name)


def test_a_given_run_of_another_method_is_read_and_nothing_is_written(
    execute: Execute, run_cli: Callable[..., None], fit_args: list[str], tmp_path: Path
) -> None:
    args = [arg for arg in fit_args if "sampling" not in arg and arg != "--model=SDFTModule"]
    run_cli(*args, "--model=SFTModule", "--trainer.log_every_n_steps=1")
    run = tmp_path / "runs" / "a"
    before = snapshot(run)
    keep = ["logged", "training", "signs", "vocabulary"]
    # The model's name is in the run's config; that of the parameters must not be asked.
    left = execute("02_read_a_run.ipynb", keep, RUN=str(run), MODEL="not/there")
    assert snapshot(run) == before
    assert left.folders == []
    assert left["vocabulary"] == 272
    assert [line["step"] for line in left["training"]] == [1, 2]
    assert "train/cross_entropy" in left["logged"]
    assert "train/kl" not in left["logged"]
    assert left.pictures == 1 + 3
