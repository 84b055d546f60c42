"""Monitors are checked against what a fit logs: all of it, and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from sdft_lightning.callbacks import CollapseGuard, DriftMonitor
from sdft_lightning.data import Columns
from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkTask
from sdft_lightning.data.sets import HeldOut
from sdft_lightning.errors import UserError
from sdft_lightning.modules import (
    CPTModule,
    DFTModule,
    OfflineDistillationModule,
    ReinvokeModule,
    SDFTModule,
    SFTKLModule,
    SFTModule,
)
from sdft_lightning.modules.monitors import training_names, validation_names
from sdft_lightning.modules.run_callbacks import ValidateAtEnds
from sdft_lightning.rollout import Sampling
from sdft_lightning.rollout.mismatch import Mismatch
from sdft_lightning.teacher import FrozenTeacher

FitModule = Callable[..., Any]
RunCli = Callable[..., None]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: choice.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


class Logged(L.Callback):
    """Keeps the names of all that was logged, and of all that was expected to be."""

    def __init__(self) -> None:
        self.logged: set[str] = set()
        self.expected: set[str] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.expected = set(training_names(pl_module, trainer, trainer.callbacks))
        self.expected |= set(validation_names(pl_module, trainer.datamodule, trainer.callbacks))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.logged |= set(trainer.callback_metrics)


@pytest.fixture
def rich_data(train_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A graded task with demonstrations, a held-out set and a benchmark."""
    (tmp_path / "choice.yaml").write_text(CHOICE)
    rows = [{"question": "Which?", "choices": ["this", "that"], "answer": i} for i in (0, 1)]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns(reference="reference", context="context", id="id")
    return {
        "validation": str(train_file),
        "grader": "contains",
        "columns": columns,
        "held_out": {"general": HeldOut(str(train_file), "contains")},
        "benchmarks": Benchmarks([BenchmarkTask(str(tmp_path / "choice.yaml"), "acc")]),
    }


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sdft": (SDFTModule, {}),
    "sdft_teacher_graded": (SDFTModule, {"evaluation": {"teacher_in_fit": True}}),
    "sdft_frozen": (SDFTModule, {"teacher": FrozenTeacher()}),
    "sdft_corrected": (SDFTModule, {"mismatch": Mismatch("token")}),
    "offline": (OfflineDistillationModule, {"evaluation": {"teacher_in_fit": True}}),
    "reinvoke": (ReinvokeModule, {"sampling": Sampling(max_new_tokens=8)}),
    "sft": (SFTModule, {}),
    "sft_kl": (SFTKLModule, {}),
    "dft": (DFTModule, {}),
    "cpt": (CPTModule, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_names_are_those_that_a_fit_logs(
    name: str, fit_module: FitModule, rich_data: dict[str, Any], model_folder: Path
) -> None:
    method, options = METHODS[name]
    if method is ReinvokeModule:
        options = {**options, "original": {"name": str(model_folder)}}
    seen = Logged()
    fit_module(
        method,
        model=options,
        data=rich_data,
        callbacks=[DriftMonitor(["general"]), CollapseGuard(), ValidateAtEnds(), seen],
        log_every_n_steps=1,
        max_steps=6,
        max_epochs=1,
    )
    assert seen.logged == seen.expected


NEAR = {
    "val_loss": "train/loss",
    "train_loss": "train/loss",
    "accuracy": "val/task/task/accuracy",
    "val/accuracy": "val/task/task/accuracy",
    "kl": "train/kl",
    "val/task/other/accuracy": "val/task/task/accuracy",
    "val/loss/dataloader_idx_0": "train/loss",
}


@pytest.mark.parametrize("given", NEAR)
def test_monitor_that_nothing_logs_is_refused_before_the_model_is_loaded(
    given: str,
    run_cli: RunCli,
    fit_args: list[str],
    train_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sdft_lightning.modules.base.load_policy", pytest.fail)
    graded = [f"--data.validation={train_file}", "--data.grader=contains"]
    graded += ["--data.columns.reference=reference", "--trainer.max_steps=6"]
    with pytest.raises(SystemExit) as stop:
        run_cli(*fit_args, *graded, f"--checkpoint.monitor={given}")
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"checkpoint.monitor: got {given!r}, which this run does not log" in message
    assert NEAR[given] in message.partition("nearest first: ")[2].split(", ")[:4], message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (EarlyStopping("val_loss"), r"EarlyStopping\.monitor: got 'val_loss'"),
        (ModelCheckpoint(monitor="loss"), r"ModelCheckpoint\.monitor: got 'loss'"),
        (ModelCheckpoint(filename="{step}-{val_loss:.2f}"), r"filename: got 'val_loss'"),
        (EarlyStopping("val/task/task/teacher_accuracy"), "which this run does not log"),
        (EarlyStopping("epoch"), r"EarlyStopping\.monitor: got 'epoch'"),
    ],
)
def test_scripts_are_told_too_before_the_model_is_loaded(
    callback: L.Callback,
    words: str,
    fit_module: FitModule,
    rich_data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdft_lightning.modules.base.load_policy", pytest.fail)
    with pytest.raises(UserError, match=words):
        fit_module(
            data={**rich_data, "benchmarks": Benchmarks()},
            callbacks=[callback],
            enable_checkpointing=True,
            max_steps=6,
        )


@pytest.mark.parametrize(
    "trainer",
    [
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": 3},
        {"check_val_every_n_epoch": None, "val_check_interval": 1000},
        {"max_steps": 5, "max_epochs": -1},
    ],
)
def test_metric_of_validations_that_never_come_is_refused(
    trainer: dict[str, Any], fit_module: FitModule, rich_data: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="No validation falls into it"):
        fit_module(
            data={**rich_data, "benchmarks": Benchmarks()},
            callbacks=[EarlyStopping("val/task/task/accuracy", mode="max")],
            **{"max_epochs": 1, "max_steps": -1, **trainer},
        )


def test_monitors_that_exist_are_watched(
    fit_module: FitModule, rich_data: dict[str, Any], tmp_path: Path
) -> None:
    best = ModelCheckpoint(
        tmp_path / "best",
        filename="{epoch}-{step}",
        monitor="val/capability/tiny_choice/acc_norm",
        mode="max",
    )
    stops = EarlyStopping("val/task/general/accuracy", mode="max")
    fit_module(
        data=rich_data,
        callbacks=[best, stops, ValidateAtEnds()],
        enable_checkpointing=True,
        max_steps=6,
        max_epochs=1,
    )
    assert best.best_model_score is not None
    assert stops.best_score.isfinite()


class OwnModule(SFTModule):
    """Logs one thing more."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/mine", 1.0)
        return super().training_step(batch, batch_idx)


def test_what_code_of_the_users_own_may_log_is_told_and_not_refused(
    fit_module: FitModule, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="train/mine", every_n_train_steps=1)
    with caplog.at_level(logging.WARNING, "sdft_lightning"):
        fit_module(OwnModule, callbacks=[best], enable_checkpointing=True)
    assert "got 'train/mine'" in caplog.text
    assert float(best.best_model_score) == 1.0


@pytest.mark.parametrize(("mode", "told"), [("min", True), ("max", False)])
def test_mode_that_keeps_the_worst_is_told(
    mode: Any, told: bool, fit_module: FitModule, rich_data: Any, caplog: Any, tmp_path: Path
) -> None:
    callback = ModelCheckpoint(tmp_path / "best", monitor="val/task/task/accuracy", mode=mode)
    with caplog.at_level(logging.WARNING, "sdft_lightning"):
        fit_module(
            data={**rich_data, "benchmarks": Benchmarks()},
            callbacks=[callback],
            enable_checkpointing=True,
            max_steps=6,
        )
    assert ("ModelCheckpoint.mode: min takes the lowest" in caplog.text) is told
