"""Benchmarks without rows: the same figures, no demonstrations, and a fit that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from sdft_lightning.data import BenchmarkDataModule, DemonstrationDataModule
from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkTask
from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy
from sdft_lightning.modules import SDFTModule, SFTModule

RunCli = Callable[..., None]


def figures(run: Path) -> dict[str, Any]:
    """What the last command of a run has measured of benchmarks."""
    (file,) = run.rglob("metrics.jsonl")
    record = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    return {name: value for name, value in record.items() if "capability" in name}


def tiny(task_file: Path) -> Benchmarks:
    return Benchmarks([BenchmarkTask(str(task_file), metric="acc")], batch_size=4)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_figures_are_those_of_the_data_module_that_has_rows_too(
    command: str,
    run_cli: RunCli,
    model_folder: Path,
    train_file: Path,
    benchmark_args: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    model = [command, "--model=SDFTModule", f"--model.policy.name={model_folder}"]
    model += ["--trainer.accelerator=cpu", "--model.evaluation.max_new_tokens=4"]
    split, stage = ("validation", "val") if command == "validate" else ("test", "test")
    rows = [f"--data.{split}={train_file}", "--data.prompts.style=turns"]
    run_cli(*model, "--run.name=alone", "--data=BenchmarkDataModule", *benchmark_args())
    run_cli(*model, "--run.name=beside", *rows, *benchmark_args())
    alone, beside = (figures(tmp_path / "runs" / name) for name in ("alone", "beside"))
    assert alone == beside
    assert 0 < alone[f"{stage}/capability/tiny_choice/acc"] <= 1


def test_options_in_a_file_are_those_of_the_data_module_that_has_rows_too(
    run_cli: RunCli, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmarks = {"tasks": [{"name": str(task_file), "metric": "acc"}], "limit": 3}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"data": {"benchmarks": benchmarks}}))
    orders = (
        ["--config=tasks.yaml", "--data=BenchmarkDataModule"],
        ["--data", "sdft_lightning.data.BenchmarkDataModule", "--config=tasks.yaml"],
    )
    for order in orders:
        with pytest.raises(SystemExit) as stop:
            run_cli("validate", "--model=SDFTModule", *order, "--print_config")
        assert stop.value.code == 0
        data = yaml.safe_load(capsys.readouterr().out)["data"]
        assert data.keys() == {"benchmarks", "num_workers"}
        assert data["benchmarks"]["limit"] == 3
        assert data["benchmarks"]["tasks"][0]["name"] == str(task_file)


def test_help_explains_the_options_of_the_class_that_is_named(
    run_cli: RunCli, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_cli("validate", "--data=BenchmarkDataModule", "--help")
    text = capsys.readouterr().out
    assert "--data.benchmarks.tasks" in text
    assert "--data.train" not in text


@pytest.mark.parametrize("command", ["fit", "predict", "preflight"])
def test_commands_that_need_rows_say_so_before_anything_is_written(
    command: str,
    run_cli: RunCli,
    model_folder: Path,
    benchmark_args: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(
            command,
            "--model=SDFTModule",
            f"--model.policy.name={model_folder}",
            "--trainer.accelerator=cpu",
            "--data=BenchmarkDataModule",
            *benchmark_args(),
        )
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "data: BenchmarkDataModule holds benchmarks alone, for `validate` and `test`" in line
    assert "DemonstrationDataModule" in line
    assert not list((tmp_path / "runs").rglob("config*.yaml"))


def test_no_tasks_are_an_error_that_names_the_option(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.benchmarks\.tasks: got none"):
        BenchmarkDataModule(str(model_folder)).setup("validate")


@pytest.mark.parametrize("method", [SDFTModule, SFTModule])
def test_plain_trainer_measures_any_module_and_loads_no_teacher(
    method: Any, model_folder: Path, task_file: Path, tmp_path: Path
) -> None:
    module, data = (
        method(policy=Policy(str(model_folder))),
        BenchmarkDataModule(benchmarks=tiny(task_file)),
    )
    (found,) = trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert 0 < found["val/capability/tiny_choice/acc"] <= 1
    assert found["val/capability/mean"] == found["val/capability/tiny_choice/acc"]
    assert not module.loads_teacher


def test_tasks_are_made_anew_for_another_model(
    model_folder: Path, make_model_folder: Callable[..., Path], task_file: Path, tmp_path: Path
) -> None:
    data, suites = BenchmarkDataModule(benchmarks=tiny(task_file)), []
    for folder in (model_folder, model_folder, make_model_folder(max_position_embeddings=256)):
        trainer(tmp_path).validate(
            SFTModule(policy=Policy(str(folder))), datamodule=data, verbose=False
        )
        suites.append(data.benchmark_suite)
    assert suites[0] is suites[1]
    assert [suite.max_length for suite in suites if suite] == [512, 512, 256]


def test_batches_are_not_limited_in_either_data_module(
    model_folder: Path, train_file: Path, task_file: Path, tmp_path: Path
) -> None:
    modules = (
        BenchmarkDataModule(benchmarks=tiny(task_file)),
        DemonstrationDataModule(validation=str(train_file), benchmarks=tiny(task_file)),
    )
    for data in modules:
        limited = trainer(tmp_path, limit_val_batches=1)
        with pytest.raises(UserError, match=r"trainer\.limit_val_batches: got 1, and benchmarks"):
            limited.validate(
                SFTModule(policy=Policy(str(model_folder))), datamodule=data, verbose=False
            )
