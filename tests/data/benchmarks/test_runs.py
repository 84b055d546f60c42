"""Benchmarks in the runs of the command line, on the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from sdft_lightning.data.benchmarks import Benchmarks


def validations(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["stage"] == "validation"]


@pytest.mark.parametrize("method", ["SDFTModule", "SFTModule"])
def test_a_fit_measures_before_the_first_step_and_at_the_end(
    run_cli: Callable[..., None],
    fit_args: list[str],
    benchmark_args: Callable[..., list[str]],
    tmp_path: Path,
    method: str,
) -> None:
    args = [arg for arg in fit_args if not arg.startswith(("--model=", "--model.sampling"))]
    run_cli("fit", f"--model={method}", *args[1:], *benchmark_args())
    found = validations(tmp_path / "runs" / "a")
    assert [record["step"] for record in found] == [0, 2]
    for record in found:
        assert 0 <= record["val/capability/tiny_choice/acc"] <= 1
        assert record["val/capability/tiny_choice/acc_stderr"] > 0
        assert record["val/capability/mean"] == record["val/capability/tiny_choice/acc"]
    if found[0]["val/capability/mean"] > 0:
        assert found[0]["val/capability/retention"] == 1.0


def test_a_fit_of_a_script_measures_before_the_first_step_and_at_the_end(
    fit_module: Callable[..., Any], task_folder: Path
) -> None:
    found: list[tuple[int, dict[str, float]]] = []

    class Look(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            found.append((trainer.global_step, metrics))

    tasks = Benchmarks([str(task_folder / "choice.yaml")])
    fit_module(data={"benchmarks": tasks}, max_steps=2, callbacks=[Look()])
    assert [step for step, _ in found] == [0, 2]
    for _, metrics in found:
        assert 0 <= metrics["val/capability/tiny_choice/acc"] <= 1


def test_only_every_nth_validation_measures(
    run_cli: Callable[..., None],
    fit_args: list[str],
    train_file: Path,
    benchmark_args: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    run_cli(
        *fit_args,
        *benchmark_args(every_n_validations=2),
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
    benchmark_args: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = [
        "validate",
        "--model=SDFTModule",
        f"--model.policy.name={model_folder}",
        "--trainer.accelerator=cpu",
        *benchmark_args(),
    ]
    run_cli(*args)
    lines = capsys.readouterr().out.splitlines()
    (row,) = [row for row in map(str.split, lines) if row[:2] == ["tiny_choice", "acc"]]
    assert row[2].endswith("%")
    assert row[3] == "±"
    assert "previous" not in lines[0]
    run_cli(*args)
    lines = capsys.readouterr().out.splitlines()
    (again,) = [row for row in map(str.split, lines) if row[:2] == ["tiny_choice", "acc"]]
    assert again == [*row, row[2]], "the second table shows the first one's value beside its own"


@pytest.mark.parametrize("batch_size", [2, 64], ids=["several batches", "fewer than processes"])
def test_two_processes_measure_what_one_does(
    model_folder: Path, task_folder: Path, tmp_path: Path, batch_size: int
) -> None:
    own = (
        "process_results: !function own.length\n"
        "metric_list: [{metric: length, aggregation: mean}]\n"
    )
    yaml = task_folder / "generation.yaml"
    yaml.write_text(yaml.read_text(encoding="utf-8").rpartition("metric_list")[0] + own)
    (task_folder / "own.py").write_text(
        "def length(doc, results):\n    return {'length': float(len(results[0]))}\n"
    )
    wanted = {"choice": "acc", "rolling": "word_perplexity", "generation": "length"}
    tasks = [
        {"name": str(task_folder / f"{name}.yaml"), "metric": metric}
        for name, metric in wanted.items()
    ]
    options = {"tasks": tasks, "batch_size": batch_size, "mean": "any", "allow_task_code": True}

    def measure(devices: int) -> dict[str, float]:
        command = [
            sys.executable,
            "-m",
            "sdft_lightning.cli",
            "validate",
            "--model=SDFTModule",
            f"--model.policy.name={model_folder}",
            "--trainer.accelerator=cpu",
            f"--trainer.devices={devices}",
            f"--run.name=d{devices}",
            "--data.benchmarks",
            json.dumps(options),
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
        record = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
        return {k: v for k, v in record.items() if "capability" in k}

    one, two = measure(1), measure(2)
    assert one == two
    for name, metric in wanted.items():
        assert one[f"val/capability/tiny_{name}/{metric}"] > 0, "zero would show nothing"


def test_a_resumed_run_keeps_its_baseline(
    run_cli: Callable[..., None],
    fit_args: list[str],
    benchmark_args: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    run_cli(*fit_args, *benchmark_args())
    first = validations(tmp_path / "runs" / "a")
    run_cli(*fit_args, *benchmark_args(), "--trainer.max_steps=4", "--ckpt_path=last")
    found = validations(tmp_path / "runs" / "a")
    assert [r["step"] for r in found] == [0, 2, 4]
    baseline = first[0]["val/capability/mean"]
    assert baseline > 0, "a baseline of zero would show nothing; change the questions"
    last = found[-1]
    expected = last["val/capability/mean"] / baseline
    assert last["val/capability/retention"] == pytest.approx(expected)


def test_a_mean_of_other_things_is_not_compared_with_the_baseline(
    run_cli: Callable[..., None],
    fit_args: list[str],
    benchmark_args: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    run_cli(*fit_args, *benchmark_args())
    run_cli(
        *fit_args,
        *benchmark_args(limit=3),
        "--trainer.max_steps=4",
        "--ckpt_path=last",
    )
    last = validations(tmp_path / "runs" / "a")[-1]
    assert "val/capability/mean" in last
    assert "val/capability/retention" not in last
