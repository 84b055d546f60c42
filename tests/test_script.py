"""A script with Lightning's own Trainer is protected as a run of the command line is."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy

from sdft_lightning.callbacks import WindowCheckpoint, default_callbacks
from sdft_lightning.cli import SDFTCLI
from sdft_lightning.cli.run_trainer import RunTrainer
from sdft_lightning.data import Columns, DemonstrationDataModule
from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.data.tokenize import Lengths
from sdft_lightning.errors import UserError, show_messages
from sdft_lightning.files import checkpoint_io
from sdft_lightning.forward.policy import Policy
from sdft_lightning.modules import SDFTModule
from sdft_lightning.modules.evaluation import Evaluation
from sdft_lightning.modules.run_checks import check_trainer
from sdft_lightning.rollout import Sampling, VLLMEngine
from sdft_lightning.types import task_data

RunCli = Callable[..., None]
Script = Callable[..., L.Trainer]


@pytest.fixture
def script(
    module_options: Callable[[dict[str, Any]], dict[str, Any]], train_file: Path, tmp_path: Path
) -> Script:
    """Fit for two steps with a plain Trainer; returns it, with module and data module."""

    def fit(
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        ckpt_path: str | None = None,
        **trainer: Any,
    ) -> L.Trainer:
        sampling = {"sampling": Sampling(max_new_tokens=8)}
        module = SDFTModule(**module_options({**sampling, **(model or {})}))
        rows = DemonstrationDataModule(
            **{
                "train": str(train_file),
                "prompts": PromptStyle("turns"),
                "batch_size": 2,
                **(data or {}),
            }
        )
        options: dict[str, Any] = {
            "max_steps": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path / "script",
        }
        made = L.Trainer(**{**options, **trainer})
        made.fit(module, datamodule=rows, ckpt_path=ckpt_path)
        return made

    return fit


class Wrong(NamedTuple):
    """The same wrong options on a command line and in a script."""

    words: str
    args: list[str]
    model: Callable[[], dict[str, Any]] = dict
    trainer: Callable[[], dict[str, Any]] = dict


VALIDATED = {"columns": Columns(reference="reference"), "grader": "contains"}
WRONG = {
    "vllm and two truncations": Wrong(
        "model.sampling: vLLM applies top_k and top_p",
        ["--model.engine=VLLMEngine", "--model.sampling.top_p=0.9", "--model.sampling.top_k=5"],
        model=lambda: {
            "sampling": Sampling(max_new_tokens=8, top_p=0.9, top_k=5),
            "engine": VLLMEngine(),
        },
    ),
    "a schedule without an end": Wrong(
        "model.schedule: got cosine",
        ["--trainer.max_steps=-1", "--trainer.max_epochs=-1"],
        trainer=lambda: {"max_steps": -1, "max_epochs": -1},
    ),
    "an optimizer that refuses its rate": Wrong(
        "model.optimizer: it refuses its options: Invalid learning rate",
        ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=-1.0"],
        model=lambda: {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=-1.0)},
    ),
    "a monitor of nothing": Wrong(
        "checkpoint.monitor: got 'train/los'",
        ["--checkpoint.monitor=train/los"],
        trainer=lambda: {"callbacks": [WindowCheckpoint(monitor="train/los")]},
    ),
    "a validation inside of a window": Wrong(
        "trainer.val_check_interval: got 3",
        ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3"],
        trainer=lambda: {"accumulate_grad_batches": 2, "val_check_interval": 3},
    ),
    "nothing to train on": Wrong(
        "trainer.limit_train_batches: got 0",
        ["--trainer.limit_train_batches=0"],
        trainer=lambda: {"limit_train_batches": 0},
    ),
    "samplers of Lightning": Wrong(
        "trainer.overfit_batches: got 1",
        ["--trainer.overfit_batches=1"],
        trainer=lambda: {"overfit_batches": 1},
    ),
    "gradients turned around": Wrong(
        "trainer.gradient_clip_val: got -1.0",
        ["--trainer.gradient_clip_val=-1.0"],
        trainer=lambda: {"gradient_clip_val": -1.0},
    ),
    "an average beside the teacher": Wrong(
        "trainer.callbacks: StochasticWeightAveraging does not work here",
        [
            "--trainer.callbacks+=lightning.pytorch.callbacks.StochasticWeightAveraging",
            "--trainer.callbacks.swa_lrs=0.1",
        ],
        trainer=lambda: {"callbacks": [StochasticWeightAveraging(swa_lrs=0.1)]},
    ),
}


def told(run_cli: RunCli, args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says of an error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(*args)
    assert stop.value.code == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.mark.parametrize("name", WRONG)
def test_script_gets_the_sentence_of_the_command_line(
    name: str,
    script: Script,
    run_cli: RunCli,
    fit_args: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    wrong = WRONG[name]
    with pytest.raises(UserError) as error:
        script(wrong.model(), **wrong.trainer())
    assert str(error.value).startswith(wrong.words)
    assert str(error.value) == told(run_cli, [*fit_args, *wrong.args], capsys)
    assert not list((tmp_path / "script").rglob("*.ckpt"))


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_prompt_without_room_is_refused_by_the_sentence_of_the_command_line(
    command: str,
    script: Script,
    run_cli: RunCli,
    fit_args: list[str],
    train_file: Path,
    make_model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = make_model_folder(max_position_embeddings=24)
    model = SDFTModule(
        policy=Policy(str(short)), sampling=Sampling(max_new_tokens=8), evaluation=Evaluation(8)
    )
    rows = DemonstrationDataModule(
        train=str(train_file),
        validation=str(train_file),
        prompts=PromptStyle("turns"),
        **VALIDATED,
    )
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="do not fit into the model, which takes 24") as error:
        getattr(trainer, command)(model, datamodule=rows)
    args = [f"--data.validation={train_file}", "--data.columns.reference=reference"]
    args += ["--data.grader=contains", f"--model.policy.name={short}"]
    if command == "validate":
        fit_args = [arg for arg in fit_args if "max_steps" not in arg]
    line = told(run_cli, [command, *fit_args[1:], *args], capsys)
    assert str(error.value) == line


def test_checks_of_the_command_line_tell_their_notices_once(
    run_cli: RunCli, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli(*fit_args, "--model.sampling.max_new_tokens=500", "--trainer.limit_train_batches=0.5")
    printed = capsys.readouterr().err
    assert printed.count("but the model has not learned to") == 1


def test_a_second_fit_is_checked_as_the_first(script: Script) -> None:
    trainer = script()
    trainer.fit_loop.epoch_loop.max_steps = -1
    trainer.fit_loop.max_epochs = -1
    with pytest.raises(UserError, match=r"^model\.schedule: got cosine"):
        trainer.fit(trainer.lightning_module, datamodule=trainer.datamodule)


def test_model_with_another_tokenizer_than_the_rows_is_one_clear_error(
    script: Script, make_model_folder: Callable[..., Path]
) -> None:
    other = make_model_folder()
    with pytest.raises(UserError, match=f"the data module has {other}, and the module .* has "):
        script(data={"model_name": str(other)})


def test_checkpoint_of_a_plain_trainer_is_whole_and_gives_the_teacher_back(
    script: Script, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    real = checkpoint_io.whole_file

    def recorded(path: Path) -> Any:
        written.append(path)
        return real(path)

    monkeypatch.setattr(checkpoint_io, "whole_file", recorded)
    # Of six micro-batches the last step has two.
    first = script(max_steps=-1, max_epochs=1, accumulate_grad_batches=4)
    assert first.global_step == 2
    (path,) = first.log_dir and Path(first.log_dir).rglob("*.ckpt")
    assert written == [path]
    trained = first.lightning_module.state_dict()

    class Look(Callback):
        """Keeps the state that a resumed fit begins with."""

        state: dict[str, torch.Tensor]

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}

    look = Look()
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 4}
    second = script(ckpt_path=str(path), callbacks=[look], **options)
    assert second.global_step == 4
    teacher = [name for name in trained if name.startswith("teacher.")]
    assert teacher
    assert look.state.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(look.state[name], value), name
    untouched = SDFTModule(policy=Policy(str(model_folder)))
    untouched.configure_model()
    before = untouched.state_dict()
    assert any(not torch.equal(trained[name], before[name]) for name in teacher)


def test_damaged_checkpoint_is_a_sentence(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"^ckpt_path: .*bad\.ckpt cannot be read as a checkpoint"):
        script(ckpt_path=str(path))


def test_checkpoint_callback_of_the_user_is_left_alone(script: Script) -> None:
    own = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = script(callbacks=[own])
    assert [each for each in trainer.callbacks if isinstance(each, ModelCheckpoint)] == [own]
    written = sorted(path.name for path in Path(str(own.dirpath)).iterdir())
    assert written == ["step=1.ckpt", "step=2.ckpt"]


def test_default_callbacks_write_what_a_run_of_the_command_line_does(
    script: Script,
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = script(callbacks=default_callbacks(), enable_progress_bar=True, log_every_n_steps=1)
    folder = tmp_path / "script"
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    names = {path.name for path in folder.rglob("*.ckpt")}
    assert names == {"last.ckpt", "step-2.ckpt"}
    ours = {type(each).__name__ for each in trainer.callbacks}
    seen: list[set[str]] = []

    def after_fit(self: SDFTCLI) -> None:
        seen.append({type(each).__name__ for each in self.trainer.callbacks})

    monkeypatch.setattr(SDFTCLI, "after_fit", after_fit, raising=False)
    run_cli(*fit_args)
    assert seen[0] - ours == {"SaveRunConfig"}  # the config is the command line's
    assert not ours - seen[0]


def test_default_callbacks_without_checkpoints_leave_them_to_the_user() -> None:
    kinds = [type(each) for each in default_callbacks(checkpoints=False)]
    assert WindowCheckpoint not in kinds
    assert [type(each) for each in default_callbacks()] == [*kinds, WindowCheckpoint]


def test_live_strategy_is_checked_as_a_named_one_is() -> None:
    trainer = L.Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", logger=False)
    with pytest.raises(UserError, match="save_distributed_checkpoint is true, allowed is false"):
        check_trainer(trainer, "fit")
    check_trainer(L.Trainer(strategy="fsdp2", accelerator="cpu", logger=False), "fit")


def test_max_time_is_no_callback_of_the_user() -> None:
    check_trainer(L.Trainer(max_time="00:01:00:00", accelerator="cpu", logger=False), "fit")


def test_fsdp2_is_a_name_after_a_module_is_imported() -> None:
    code = (
        "from sdft_lightning.modules import SFTModule; import lightning as L; "
        "t = L.Trainer(strategy='fsdp2', accelerator='cpu'); print(type(t.strategy).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["FSDP2Strategy"]


def test_data_module_of_the_user_is_not_asked(train_file: Path) -> None:
    class Own(L.LightningDataModule):
        benchmark_suite = None

    class Trainer(NamedTuple):
        datamodule: Any

    rows = DemonstrationDataModule("embedded", train=str(train_file))
    assert task_data(Trainer(rows)) is rows  # before its set-up, too
    assert task_data(Trainer(Own())) is None
    assert task_data(None) is None


def test_monitor_with_data_of_the_user_is_warned_of(
    script: Script, caplog: pytest.LogCaptureFixture, model_folder: Path, train_file: Path
) -> None:
    class Own(DemonstrationDataModule):
        task = "mine"

    Own.__module__ = "somebody"
    module = SDFTModule(policy=Policy(str(model_folder)), sampling=Sampling(max_new_tokens=8))
    rows = Own(train=str(train_file), prompts=PromptStyle("turns"), batch_size=2)
    stops = EarlyStopping("mine/score", strict=False)
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[stops]
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, datamodule=rows)
    assert "EarlyStopping.monitor: got 'mine/score'" in caplog.text


@contextmanager
def unset_logging() -> Iterator[logging.Logger]:
    """A program that has set up no logging; all is put back."""
    root, ours = logging.getLogger(), logging.getLogger("sdft_lightning")
    before = root.handlers[:], ours.handlers[:], ours.level, ours.propagate
    root.handlers[:], ours.handlers[:], ours.propagate = [], [], True
    ours.setLevel(logging.NOTSET)
    try:
        with warnings.catch_warnings():
            warnings.resetwarnings()
            yield ours
    finally:
        root.handlers[:], ours.handlers[:], ours.level, ours.propagate = before


def test_notices_are_printed_where_nobody_has_set_up_logging(
    capsys: pytest.CaptureFixture[str], train_file: Path
) -> None:
    for makes in (SDFTModule, lambda: DemonstrationDataModule("embedded", train=str(train_file))):
        with unset_logging():
            makes()
            logging.getLogger("sdft_lightning.data").info("train: 12 rows")
        assert capsys.readouterr().err == "train: 12 rows\n"


def test_logging_and_filters_of_the_program_stay() -> None:
    handler = logging.NullHandler()
    with unset_logging() as ours:
        logging.getLogger().addHandler(handler)
        warnings.simplefilter("error")
        show_messages()
        assert logging.getLogger().handlers == [handler]
        assert ours.handlers == []
        assert ours.propagate
        with pytest.raises(UserWarning, match="in eval mode"):
            warnings.warn("Found 34 module(s) in eval mode at the start of training", stacklevel=1)


def test_misleading_warnings_are_dropped_and_no_others() -> None:
    with unset_logging(), warnings.catch_warnings(record=True) as seen:
        show_messages()
        warnings.warn("Found 34 module(s) in eval mode at the start of training.", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(each.message) for each in seen] == ["something else"]


def test_fit_after_preflight_in_one_script_is_checked_anew(
    model_folder: Path, train_file: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    long = json.dumps({"prompt": "word " * 200, "demonstration": "It is so."})
    rows.write_text(train_file.read_text() + long + "\n")
    module = SDFTModule(policy=Policy(str(model_folder)), sampling=Sampling(max_new_tokens=4))
    data = DemonstrationDataModule(
        train=str(rows), prompts=PromptStyle("turns"), lengths=Lengths(prompt=100), batch_size=2
    )
    options = {"max_steps": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = RunTrainer(default_root_dir=tmp_path, **options)
    report = trainer.preflight(module, data, rows=2)
    assert len(report.too_long) == 1
    with pytest.raises(UserError, match="too long: its prompt has"):
        trainer.fit(module, datamodule=data)
