"""Benchmarks in the runs of the command line, on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"question": f"Which is {word}?", "choices": [word, "no", "maybe"], "answer": i % 3}
    for i, word in enumerate(("red", "a long blue one", "green", "x", "last"))
]
YAML = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: choice.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "choice.yaml").write_text(YAML)
    return folder / "choice.yaml"


def benchmark_args(task_file: Path, **settings: Any) -> list[str]:
    task = {"name": str(task_file), "metric": "acc"}
    options = {"tasks": [task], "batch_size": 4, **settings}
    return ["--data.benchmarks", json.dumps(options)]


def validations(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["stage"] == "validation"]


@pytest.mark.parametrize("method", ["SDFTModule", "SFTModule"])
def test_a_fit_measures_before_the_first_step_and_at_the_end(
    run_cli: Callable[..., None],
    fit_args: list[str],
    task_file: Path,
    tmp_path: Path,
    method: str,
) -> None:
    args = [arg for arg in fit_args if not arg.startswith(("--model=", "--model.sampling"))]
    run_cli("fit", f"--model={method}", *args[1:], *benchmark_args(task_file))
    found = validations(tmp_path / "runs" / "a")
    assert [record["step"] for record in found] == [0, 2]
    for record in found:
        assert 0 <= record["val/capability/tiny_choice/acc"] <= 1
        assert record["val/capability/tiny_choice/acc_stderr"] > 0
        assert record["val/capability/mean"] == record["val/capability/tiny_choice/acc"]
    if found[0]["val/capability/mean"] > 0:
        assert found[0]["val/capability/retention"] == 1.0


def test_only_every_nth_validation_measures(
    run_cli: Callable[..., None],
    fit_args: list[str],
    train_file: Path,
    task_file: Path,
    tmp_path: Path,
) -> None:
    run_cli(
        *fit_args,
        *benchmark_args(task_file, every_n_validations=2),
        f"--data.validation={train_file}",
        "--data.columns.reference=reference",
        "--data.grader=contains",
        "--trainer.max_steps=5",
        "--trainer.val_check_interval=1",
        "--trainer.check_val_every_n_epoch=null",
        "--trainer.num_sanity_val_steps=1",
    )
    found = validations(tmp_path / "runs" / "a")
    measured = [r["step"] for r in found if "val/capability/mean" in r]
    assert [r["step"] for r in found] == [0, 1, 2, 3, 4, 5, 5]
    assert measured == [0, 2, 4, 5]


def test_validate_alone_needs_no_demonstrations(
    run_cli: Callable[..., None],
    model_folder: Path,
    task_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = [
        "validate",
        "--model=SDFTModule",
        f"--model.model_name={model_folder}",
        "--trainer.accelerator=cpu",
        *benchmark_args(task_file),
    ]
    run_cli(*args)
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("tiny_choice")]
    assert row[1] == "acc"
    assert row[2].endswith("%")
    assert row[3] == "±"
    assert "previous" not in lines[0]
    run_cli(*args)
    lines = capsys.readouterr().out.splitlines()
    (again,) = [line.split() for line in lines if line.startswith("tiny_choice")]
    assert again == [*row, row[2]], "the second table shows the first one's value beside its own"


@pytest.mark.parametrize("batch_size", [2, 64], ids=["several batches", "fewer than processes"])
def test_two_processes_measure_what_one_does(
    model_folder: Path, task_file: Path, tmp_path: Path, batch_size: int
) -> None:
    import os
    import subprocess
    import sys

    def measure(devices: int) -> dict[str, float]:
        command = [
            sys.executable,
            "-m",
            "sdft_lightning.cli",
            "validate",
            "--model=SDFTModule",
            f"--model.model_name={model_folder}",
            "--trainer.accelerator=cpu",
            f"--trainer.devices={devices}",
            f"--run.name=d{devices}",
            *benchmark_args(task_file, batch_size=batch_size),
        ]
        if devices > 1:
            command.append("--trainer.strategy=ddp")
        subprocess.run(
            command,
            cwd=tmp_path,
            check=True,
            timeout=240,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        (file,) = (tmp_path / "runs" / f"d{devices}").rglob("metrics.jsonl")
        record = json.loads(file.read_text().splitlines()[-1])
        return {k: v for k, v in record.items() if "capability" in k}

    one, two = measure(1), measure(2)
    assert one == two
    assert len(one) >= 3


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"tasks": ["hellaswagg"]}, ["no task 'hellaswagg'", "hellaswag", "lm-eval ls tasks"]),
        ({"tasks": ["missing.yaml"]}, ["there is no file missing.yaml"]),
        ({"mean": "all"}, ["data.benchmarks.mean", "'alike', 'any', 'off'", "all"]),
        ({"limit": 1.5}, ["data.benchmarks.limit", "1.5"]),
    ],
)
def test_bad_options_name_the_remedy(
    run_cli: Callable[..., None],
    fit_args: list[str],
    task_file: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    wanted: list[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(*fit_args, *benchmark_args(task_file, **settings))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    for text in wanted:
        assert text in message


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"metric: acc}": "metric: acc}", "METRIC": "f1"}, ["no metric 'f1'", "acc"]),
        ({"choice.jsonl": "other.jsonl"}, ["other.jsonl", "data_dir"]),
        ({"task: tiny_choice": "same_as: hellaswagg"}, ["same_as", "'hellaswagg'"]),
        ({"task: tiny_choice": ""}, ["names no task"]),
        ({"dataset_path: json": "dataset_path: no-such/data"}, ["cannot be had", "Remedy"]),
    ],
)
def test_a_bad_task_file_is_named(
    run_cli: Callable[..., None],
    fit_args: list[str],
    task_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    wanted: list[str],
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    text = task_file.read_text()
    for old, new in change.items():
        text = text.replace(old, new)
    if "no-such" in text:
        text = text.replace("dataset_kwargs: {data_files: {validation: choice.jsonl}}", "")
    task_file.write_text(text)
    metric = change.get("METRIC", "acc")
    with pytest.raises(SystemExit) as stopped:
        run_cli(
            *fit_args,
            "--data.benchmarks",
            json.dumps({"tasks": [{"name": str(task_file), "metric": metric}]}),
        )
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    for wish in wanted:
        assert wish in message


def test_unlike_metrics_are_averaged_only_on_demand(
    run_cli: Callable[..., None],
    fit_args: list[str],
    task_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = task_file.with_name("other.yaml")
    other.write_text(
        YAML.replace("tiny_choice", "tiny_norm").replace("metric: acc}", "metric: acc_norm}")
    )
    tasks = [
        {"name": str(task_file), "metric": "acc"},
        {"name": str(other), "metric": "acc_norm"},
    ]
    with pytest.raises(SystemExit):
        run_cli(*fit_args, "--data.benchmarks", json.dumps({"tasks": tasks}))
    message = capsys.readouterr().err
    assert "acc of tiny_choice" in message
    assert "acc_norm of tiny_norm" in message
    run_cli(*fit_args, "--data.benchmarks", json.dumps({"tasks": tasks, "mean": "any"}))
    record = validations(tmp_path / "runs" / "a")[-1]
    values = [record["val/capability/tiny_choice/acc"], record["val/capability/tiny_norm/acc_norm"]]
    assert record["val/capability/mean"] == pytest.approx(sum(values) / 2)


@pytest.mark.parametrize("limit", ["1", "0.5"])
def test_part_of_the_batches_is_refused(
    run_cli: Callable[..., None],
    fit_args: list[str],
    task_file: Path,
    capsys: pytest.CaptureFixture[str],
    limit: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(*fit_args, *benchmark_args(task_file), f"--trainer.limit_val_batches={limit}")
    assert stopped.value.code == 2
    assert "trainer.limit_val_batches" in capsys.readouterr().err


def test_the_same_task_twice_is_refused(
    run_cli: Callable[..., None],
    fit_args: list[str],
    task_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = [str(task_file), str(task_file)]
    with pytest.raises(SystemExit):
        run_cli(*fit_args, "--data.benchmarks", json.dumps({"tasks": tasks}))
    assert "both measure tiny_choice" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_baseline(
    run_cli: Callable[..., None], fit_args: list[str], task_file: Path, tmp_path: Path
) -> None:
    run_cli(*fit_args, *benchmark_args(task_file))
    first = validations(tmp_path / "runs" / "a")
    run_cli(*fit_args, *benchmark_args(task_file), "--trainer.max_steps=4", "--ckpt_path=last")
    found = validations(tmp_path / "runs" / "a")
    assert [r["step"] for r in found] == [0, 2, 4]
    baseline = first[0]["val/capability/mean"]
    assert baseline > 0, "a baseline of zero would show nothing; change the questions"
    last = found[-1]
    expected = last["val/capability/mean"] / baseline
    assert last["val/capability/retention"] == pytest.approx(expected)


def test_a_mean_of_other_things_is_not_compared_with_the_baseline(
    run_cli: Callable[..., None], fit_args: list[str], task_file: Path, tmp_path: Path
) -> None:
    run_cli(*fit_args, *benchmark_args(task_file))
    run_cli(
        *fit_args,
        *benchmark_args(task_file, limit=3),
        "--trainer.max_steps=4",
        "--ckpt_path=last",
    )
    last = validations(tmp_path / "runs" / "a")[-1]
    assert "val/capability/mean" in last
    assert "val/capability/retention" not in last
