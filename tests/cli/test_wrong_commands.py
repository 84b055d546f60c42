"""Commands that are wrong in some way end in one sentence, with exit code 2 and the name free."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

RunCli = Callable[..., None]
ALSO = "--trainer.callbacks+="


class Case(NamedTuple):
    """A command with options, and words of its sentence."""

    options: list[str]
    words: list[str]
    command: str = "fit"


GRADED = ["--data.validation=train.jsonl", "--data.grader=contains"]
GRADED += ["--data.columns.reference=reference", "--trainer.max_steps=6"]
CASES = {
    # names of monitors
    "monitor_of_other_programs": Case(
        [*GRADED, "--checkpoint.monitor=val_loss"],
        ["checkpoint.monitor: got 'val_loss'", "the nearest first: train/loss"],
    ),
    "monitor_of_a_set_that_is_not_there": Case(
        [*GRADED, f"{ALSO}EarlyStopping", "--trainer.callbacks.monitor=val/task/dogs/accuracy"],
        ["EarlyStopping.monitor: got 'val/task/dogs/accuracy'", "val/task/task/accuracy"],
    ),
    "monitor_of_validations_that_never_come": Case(
        [*GRADED, "--trainer.limit_val_batches=0", "--checkpoint.monitor=val/task/task/accuracy"],
        ["checkpoint.monitor", "No validation falls into it"],
    ),
    "file_name_of_what_is_not_logged": Case(
        ["--checkpoint.filename={step}-{val_loss:.2f}"], ["checkpoint.filename: got 'val_loss'"]
    ),
    "file_name_outside_of_the_run": Case(
        ["--checkpoint.filename=../../x"], ["checkpoint.filename", "below the folder"]
    ),
    # whole windows and lengths
    "fewer_rows_than_a_batch": Case(
        ["--data.batch_size=13"], ["data.batch_size: 13 rows", "at most 12"]
    ),
    "window_of_nothing": Case(
        ["--trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches: got 0"]
    ),
    "validation_inside_a_window": Case(
        [*GRADED, "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3"],
        ["trainer.val_check_interval: got 3", "inside a window"],
    ),
    # checkpoints
    "no_checkpoint_yet": Case(["--ckpt_path=last"], ["ckpt_path", "none yet"]),
    "rows_for_a_checkpoint": Case(["--ckpt_path=train.jsonl"], ["ckpt_path", "train.jsonl"]),
    "export_of_nothing": Case([], ["ckpt_path: export needs a checkpoint"], "export"),
    "optimizer_that_is_none": Case(["--model.optimizer=Foo"], ["model.optimizer", "Foo"]),
    "teacher_that_is_none": Case(["--model.teacher=torch.nn.Linear"], ["model.teacher", "Linear"]),
    # what Lightning and jsonargparse refuse
    "interval_longer_than_an_epoch": Case(
        ["--trainer.val_check_interval=100000"], ["--trainer.val_check_interval", "batches (6)"]
    ),
    "interval_of_0": Case(
        ["--trainer.val_check_interval=0"], ["trainer.val_check_interval: got 0"]
    ),
    "gpu_that_is_not_there": Case(
        ["--trainer.accelerator=cuda"], ["--trainer.accelerator", "'cuda'"]
    ),
    "devices_of_no_number": Case(["--trainer.devices=foo"], ["--trainer.devices", "'foo'"]),
    "more_processes_than_rows": Case(
        ["--trainer.devices=99"], ["99 processes", "a lower --trainer.devices"]
    ),
    "machines_that_nobody_started": Case(
        ["--trainer.num_nodes=2"], ["trainer.num_nodes: got 2", "torchrun"]
    ),
    "part_of_no_batch": Case(
        ["--trainer.limit_train_batches=0.001"], ["--trainer.limit_train_batches", "0.001"]
    ),
    "no_batch_at_all": Case(
        ["--trainer.limit_train_batches=0"], ["trainer.limit_train_batches: got 0"]
    ),
    "logger_without_its_package": Case(
        ["--trainer.logger=WandbLogger"], ["trainer.logger", "wandb", "pip install"]
    ),
    "logger_without_a_folder": Case(["--trainer.logger=CSVLogger"], ["trainer.logger", "save_dir"]),
    "second_model_checkpoint": Case([f"{ALSO}ModelCheckpoint"], ["--trainer.callbacks", "unique"]),
    "tuner": Case([f"{ALSO}LearningRateFinder"], ["trainer.callbacks: LearningRateFinder"]),
    "batch_size_tuner": Case([f"{ALSO}BatchSizeFinder"], ["BatchSizeFinder", "data.batch_size"]),
    "timer": Case(
        [f"{ALSO}Timer", "--trainer.callbacks.duration=00:00:01:00"],
        ["trainer.callbacks: Timer", "--trainer.max_time"],
    ),
    "averages_of_lightning": Case(
        [f"{ALSO}EMAWeightAveraging"], ["EMAWeightAveraging", "--model.teacher=EMATeacher"]
    ),
    "time_of_no_form": Case(["--trainer.max_time=abc"], ["--trainer.max_time", "'abc'"]),
    "profiler_of_no_name": Case(["--trainer.profiler=foo"], ["--trainer.profiler", "'foo'"]),
    "clipping_of_no_kind": Case(
        ["--trainer.gradient_clip_algorithm=foo"], ["--trainer.gradient_clip_algorithm"]
    ),
    "precision_of_no_kind": Case(["--trainer.precision=7"], ["trainer.precision", "(got 7)"]),
    "strategy_of_no_name": Case(["--trainer.strategy=nonsense"], ["--trainer.strategy"]),
    "folder_that_is_not_obeyed": Case(
        ["--trainer.default_root_dir=x"], ["trainer.default_root_dir: got x", "--run.root"]
    ),
    "tab_in_the_config": Case(["--config=tab.yaml"], ["tab.yaml, line 2 is no YAML"]),
    "option_twice_in_the_config": Case(
        ["--config=twice.yaml"], ["twice.yaml, line 3: max_steps stands twice"]
    ),
    "config_of_no_text": Case(["--config=bytes.yaml"], ["bytes.yaml cannot be read as YAML"]),
    "aliases_that_multiply": Case(
        ["--config=bomb.yaml"], ["bomb.yaml: its aliases (*name) come to"]
    ),
    "option_that_is_none": Case(["--trainer.foo=1"], ["--trainer.foo=1"]),
    # evaluation
    "nothing_to_validate": Case([], ["data.validation: `validate` needs it"], "validate"),
    "validation_of_no_batch": Case(
        ["--data.validation=train.jsonl", "--trainer.limit_val_batches=0"],
        ["trainer.limit_val_batches: got 0", "`validate`"],
        "validate",
    ),
    "test_of_part_of_no_batch": Case(
        ["--data.test=train.jsonl", "--trainer.limit_test_batches=0.001"],
        ["--trainer.limit_test_batches"],
        "test",
    ),
    "benchmark_that_is_none": Case(
        ['--data.benchmarks.tasks=["hellaswagg"]'],
        ["data.benchmarks.tasks", "no task 'hellaswagg'", "hellaswag"],
        "validate",
    ),
    "benchmark_turns_without_a_template": Case(
        ['--data.benchmarks.tasks=[{"name": "arc_easy", "fewshot_as_multiturn": true}]'],
        ["data.benchmarks.tasks: arc_easy", "apply_chat_template"],
        "validate",
    ),
    "mean_on": Case(
        ["--data.benchmarks.mean=on"], ["data.benchmarks.mean: got True", "alike, any, off"]
    ),
    "held_out_of_no_form": Case(["--data.held_out={a: 1}"], ["data.held_out", "HeldOut"]),
    "column_of_another_file": Case(
        ["--data.columns.demonstration=sound"], ["data.columns.demonstration", "'sound'"]
    ),
    "format_that_is_none": Case(["--format=gguf"], ["format", "'merged', 'adapter'"], "export"),
}
PROCESSES = ["monitor_of_other_programs", "logger_without_its_package", "nothing_to_validate"]


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Files of options that are no good."""
    (tmp_path / "tab.yaml").write_text("trainer:\n\tmax_steps: 1\n")
    (tmp_path / "twice.yaml").write_text("trainer:\n  max_steps: 1\n  max_steps: 2\n")
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(128, 256)))
    bomb = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(bomb))


def arguments(case: Case, fit_args: list[str]) -> list[str]:
    return [case.command, *fit_args[1:], *case.options]


def check_message(message: str, words: list[str]) -> None:
    assert "Traceback" not in message
    assert message.count("error: ") == 1
    sentence = message.partition("error: ")[2]
    assert sentence.count("\n") == 1, sentence
    for word in words:
        assert word in sentence, sentence


def test_there_are_forty_of_them() -> None:
    assert len(CASES) >= 40
    assert set(PROCESSES) <= set(CASES)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", CASES)
def test_wrong_command_ends_in_a_sentence_and_leaves_the_name_free(
    name: str,
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable in ("MASTER_ADDR", "NODE_RANK", "SLURM_NTASKS", "KUBERNETES_PORT"):
        monkeypatch.delenv(variable, raising=False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(*arguments(CASES[name], fit_args))
    assert stop.value.code == 2
    check_message(capsys.readouterr().err, CASES[name].words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_process_of_a_wrong_command_ends_in_the_same_sentence(
    name: str, fit_args: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdft_lightning.cli", *arguments(CASES[name], fit_args)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    check_message(done.stderr, CASES[name].words)
    assert not (tmp_path / "runs").exists()


MINE = """
import lightning as L

class Broken(L.Callback):
    def setup(self, trainer, pl_module, stage):
        raise ValueError("a fault of the user's own code")
"""


def test_fault_in_the_users_own_code_keeps_its_traceback(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_broken.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="a fault of the user's own code"):
        run_cli(*fit_args, f"{ALSO}mine_broken.Broken")


def test_fault_in_this_package_keeps_its_traceback(
    run_cli: RunCli, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last frame that is not a library's is the package's: not Lightning's, which called it.
    monkeypatch.setattr("sdft_lightning.cli.run_trainer.run_folder", None)
    with pytest.raises(TypeError, match="not callable"):
        run_cli(*fit_args)
