"""A run that is told to stop, finds a broken checkpoint, a full disk, a dead helper, no Hub."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

RunCli = Callable[..., None]

SENDER = """
import multiprocessing, os, signal
import lightning as L

class Send(L.Callback):
    '''Sends a signal to this process: in a training batch, or in a validation batch of a step.'''
    def __init__(self, number: int, batch: int = -1, validation_at: int = -1) -> None:
        self.number, self.batch, self.validation_at = number, batch, validation_at

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.validation_at:
            self.validation_at = -1
            os.kill(os.getpid(), self.number)

class KillWorkers(L.Callback):
    def on_train_batch_end(self, trainer, *args) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
"""


@pytest.fixture
def run_args(
    fit_args: list[str],
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[str]]:
    """Six steps of two micro-batches, a checkpoint after every second, every completion logged."""
    write_rows(make_rows(24), "train.jsonl")
    (tmp_path / "sender.py").write_text(SENDER)
    monkeypatch.syspath_prepend(tmp_path)

    def args(name: str, *more: str) -> list[str]:
        return [
            *fit_args,
            "--model.optimizer.lr=0.01",
            "--trainer.max_steps=6",
            "--trainer.accumulate_grad_batches=2",
            "--trainer.logger=false",
            "--checkpoint.every_n_train_steps=2",
            "--checkpoint.save_top_k=-1",
            "--trainer.callbacks+=CompletionLog",
            "--trainer.callbacks.every_n_steps=1",
            f"--run.name={name}",
            *more,
        ]

    return args


def send(number: int, **when: int) -> list[str]:
    given = {"number": number, **when}
    options = [f"--trainer.callbacks.{name}={value}" for name, value in given.items()]
    return ["--trainer.callbacks+=sender.Send", *options]


def saved(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / name, weights_only=True)
    return content


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = saved(one), saved(other)
    assert mine["global_step"] == theirs["global_step"] == 6
    assert mine["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in theirs["state_dict"].items():
        assert torch.equal(mine["state_dict"][name], value), name


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """Signals mean what they do there, also where the tests run in the background, or by nohup."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after == usual  # whatever the test did


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_inside_an_accumulation_window_saves_after_the_step_and_is_gone_on_from_exactly(
    number: signal.Signals,
    run_cli: RunCli,
    run_args: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    run_cli(*run_args("whole"))
    # The first micro-batch of step 3: saved there, the second's gradient alone would be stepped.
    with pytest.raises(SystemExit) as stop:
        run_cli(*run_args("parts", *send(number, batch=4)))
    assert stop.value.code == 128 + number
    message = capsys.readouterr().err
    assert (
        f"Stopped by {number.name} after step 3; saved runs/parts/checkpoints/last.ckpt" in message
    )
    assert "--ckpt_path=last" in message
    assert saved(parts)["global_step"] == 3
    assert saved(parts)["callbacks"]["TeacherUpdate"] == {"updated_at": 3}
    run_cli(*run_args("parts", "--ckpt_path=last"))
    assert_same_weights(parts, whole)
    assert lines(parts / "completions.jsonl") == lines(whole / "completions.jsonl")


@pytest.mark.usefixtures("as_in_a_terminal")
def test_hang_up_stays_ignored_under_nohup(
    run_cli: RunCli, run_args: Callable[..., list[str]], tmp_path: Path
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_cli(*run_args("a", *send(1, batch=4)))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert saved(tmp_path / "runs" / "a")["global_step"] == 6


@pytest.mark.usefixtures("as_in_a_terminal")
def test_ctrl_c_outside_of_training_is_one_line_and_130(
    run_cli: RunCli,
    run_args: Callable[..., list[str]],
    train_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused = ("--data.train", "--trainer.max_steps", "--checkpoint", "--trainer.callbacks")
    options = [each for each in run_args("a")[1:] if not each.startswith(refused)]
    given = [f"--data.validation={train_file}", "--data.grader=contains"]
    given += ["--data.columns.reference=reference"]
    with pytest.raises(SystemExit) as stop:
        run_cli("validate", *options, *given, *send(2, validation_at=0))
    message = capsys.readouterr().err
    assert stop.value.code == 130
    assert message.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in message


def test_sigterm_in_a_validation_saves_and_no_part_of_it_is_taken_for_the_whole(
    run_cli: RunCli, run_args: Callable[..., list[str]], train_file: Path, tmp_path: Path
) -> None:
    validated = [
        f"--data.validation={train_file}",
        "--data.grader=contains",
        "--data.columns.reference=reference",
        "--data.eval_batch_size=2",
        "--trainer.val_check_interval=4",
        "--trainer.check_val_every_n_epoch=null",
        "--trainer.num_sanity_val_steps=0",
    ]
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    run_cli(*run_args("whole", *validated))
    with pytest.raises(SystemExit) as stop:
        run_cli(*run_args("parts", *validated, *send(15, validation_at=4)))
    assert stop.value.code == 143
    assert saved(parts)["global_step"] == 4
    run_cli(*run_args("parts", *validated, "--ckpt_path=last"))
    assert_same_weights(parts, whole)
    expected = {
        line["step"]: line["val/task/task/accuracy"]
        for line in lines(whole / "metrics.jsonl")
        if line["stage"] == "validation"
    }
    found = [line for line in lines(parts / "metrics.jsonl") if line["stage"] == "validation"]
    assert {line["step"] for line in found} >= {2, 6}
    for line in found:
        assert line["val/task/task/accuracy"] == expected[line["step"]]


def test_slurm_requeues_the_job_and_its_second_life_goes_on_by_itself(
    run_cli: RunCli,
    run_args: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    run_cli(*run_args("whole"))
    # As `#SBATCH --signal=SIGUSR1@90` has it; requeuing ends the job with SIGTERM.
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nkill -TERM $PPID\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    job = {"JOB_ID": "77", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1"}
    for name, value in {**job, "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    command = run_args("parts", *send(10, batch=5))
    with pytest.raises(SystemExit) as stop:
        run_cli(*command)
    assert stop.value.code == 143
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    # Taken at the boundary after step 3, when the teacher had moved; SIGTERM one step later.
    at_signal = torch.load(parts / "hpc_ckpt_1.ckpt", weights_only=True)
    assert at_signal["global_step"] == 3
    assert at_signal["callbacks"]["TeacherUpdate"] == {"updated_at": 3}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run_cli(*command)
    assert_same_weights(parts, whole)


def test_full_disk_ends_the_run_with_a_message_and_keeps_the_last_good_checkpoint(
    run_cli: RunCli,
    run_args: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sync, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 6:  # file and folder, of step-2, last and step-4
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        run_cli(*run_args("a"))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "error: " in message
    assert "last.ckpt could not be written: the disk is full" in message
    assert "Traceback" not in message
    run = tmp_path / "runs" / "a"
    assert saved(run)["global_step"] == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step-2.ckpt",
        "step-4.ckpt",
    ]


def test_broken_last_checkpoint_is_skipped_for_the_newest_that_can_be_read(
    run_cli: RunCli,
    run_args: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_cli(*run_args("a"))
    folder = tmp_path / "runs" / "a" / "checkpoints"
    whole = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "step-6.ckpt").write_bytes(b"")
    os.utime(folder / "step-2.ckpt", (1, 1))
    capsys.readouterr()
    run_cli(*run_args("a", "--trainer.max_steps=8", "--ckpt_path=last"))
    message = capsys.readouterr().err
    assert "last.ckpt cannot be read as a checkpoint" in message
    assert "step-6.ckpt cannot be read as a checkpoint" in message
    assert "last stands for runs/a/checkpoints/step-4.ckpt" in message
    assert saved(folder.parent)["global_step"] == 8


def test_when_no_checkpoint_can_be_read_the_run_is_refused(
    run_cli: RunCli,
    run_args: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "runs" / "a" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit) as stop:
        run_cli(*run_args("a", "--ckpt_path=last"))
    assert stop.value.code == 2
    assert "there is no checkpoint that can be read" in capsys.readouterr().err


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_last_is_where_the_run_stands_also_if_sigterm_wrote_it_before_any_checkpoint(
    run_cli: RunCli, run_args: Callable[..., list[str]], tmp_path: Path
) -> None:
    # ModelCheckpoint would write last-v1.ckpt beside a last.ckpt that it did not write itself.
    run = tmp_path / "runs" / "a"
    with pytest.raises(SystemExit):
        run_cli(*run_args("a", *send(15, batch=0)))
    assert checkpoint_names(run) == ["last.ckpt"]
    assert saved(run)["global_step"] == 1
    run_cli(*run_args("a", "--trainer.max_steps=4", "--ckpt_path=last"))
    assert saved(run)["global_step"] == 4
    run_cli(*run_args("a", "--ckpt_path=last"))
    assert saved(run)["global_step"] == 6
    assert checkpoint_names(run) == ["last.ckpt", "step-2.ckpt", "step-4.ckpt", "step-6.ckpt"]


def test_last_is_replaced_when_the_folder_is_named_by_another_path(
    run_cli: RunCli, run_args: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    run_cli(*run_args("a", "--trainer.max_steps=2"))
    root = f"--run.root={tmp_path / 'runs'}"
    run_cli(*run_args("a", "--trainer.max_steps=4", root, "--ckpt_path=last"))
    assert saved(run)["global_step"] == 4
    assert [name for name in checkpoint_names(run) if "last" in name] == ["last.ckpt"]


def checkpoint(path: Path, step: int, written: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step}, path)
    os.utime(path, (written, written))
    return path


def test_last_stands_for_what_was_written_later_and_is_further_on(tmp_path: Path) -> None:
    from sdft_lightning.files.run_folder import resolve_checkpoint

    folder = tmp_path / "checkpoints"
    last = checkpoint(folder / "last.ckpt", 4, 100)
    assert resolve_checkpoint("last", tmp_path) == str(last)
    checkpoint(folder / "step-2.ckpt", 2, 200)  # a copied folder has new times
    checkpoint(folder / "step-9.ckpt", 9, 50)  # from before the run was put back
    assert resolve_checkpoint("last", tmp_path) == str(last)
    further = checkpoint(folder / "last-v1.ckpt", 6, 150)
    assert resolve_checkpoint("last", tmp_path) == str(further)
    requeued = checkpoint(tmp_path / "hpc_ckpt_1.ckpt", 7, 160)
    assert resolve_checkpoint("last", tmp_path) == str(requeued)


def test_job_that_slurm_starts_again_before_its_first_checkpoint_starts_anew(
    run_cli: RunCli,
    run_args: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("# of the first life\n")
    with pytest.raises(SystemExit) as stop:
        run_cli(*run_args("a"))
    assert stop.value.code == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run_cli(*run_args("a", "--trainer.max_steps=1"))
    assert (run / "config.yaml").read_text() == "# of the first life\n"
    assert (run / "config-1.yaml").exists()
    assert lines(run / "completions.jsonl")


@pytest.mark.parametrize("place", ["file", "/proc"])
def test_folder_that_cannot_be_made_is_told_before_any_work(
    run_cli: RunCli,
    run_args: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as stop:
        # The model is never looked at.
        run_cli(*run_args("a", f"--run.root={place}/runs", "--model.policy.name=none"))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"run.root: {place}/runs/a cannot be made or written into" in message
    assert "--run.root" in message
    assert "Traceback" not in message


def test_full_disk_where_a_library_writes_is_told_too(
    run_cli: RunCli,
    run_args: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "config.yaml")

    monkeypatch.setattr("sdft_lightning.cli.run_trainer.SaveRunConfig.setup", full)
    with pytest.raises(SystemExit) as stop:
        run_cli(*run_args("a"))
    assert stop.value.code == 2
    assert "error: config.yaml could not be written: the disk is full" in capsys.readouterr().err


def test_dead_worker_of_the_loader_is_told_with_its_remedy(
    run_cli: RunCli,
    run_args: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(*run_args("a", "--data.num_workers=1", "--trainer.callbacks+=sender.KillWorkers"))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    for words in ("data.num_workers", "has died", "ran out of memory", "--data.num_workers=0"):
        assert words in message


ASK_THE_HUB = """
import time
time.sleep = lambda seconds: None  # the Hub's client waits 23 s before it gives a host up
from sdft_lightning.data.sources import HubSource, read_rows
from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.tokenization import load_max_length, load_stop_ids, load_tokenizer

class Eos:
    eos_token_id = 1

calls = {
    "policy": lambda: load_policy(Policy("acme/none")),
    "tokenizer": lambda: load_tokenizer("acme/none"),
    "max_length": lambda: load_max_length("acme/none", None),
    "rows": lambda: read_rows(HubSource(repo="acme/none", split="train"), "data.train"),
}
for name, call in calls.items():
    try:
        call()
    except UserError as error:
        print(name, "|", str(error).replace(chr(10), " "))
print("stop_ids", "|", load_stop_ids("acme/none", Eos()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_hub_that_cannot_be_reached_is_told_for_models_and_data(
    environment: dict[str, str], tmp_path: Path
) -> None:
    repository = Path(__file__).parents[2]
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", ASK_THE_HUB],
        env={**inherited, **environment, "HF_HOME": str(tmp_path), "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    found = dict(line.split(" | ", 1) for line in done.stdout.splitlines() if " | " in line)
    assert found["stop_ids"] == "[1]"
    for name in ("policy", "tokenizer", "max_length"):
        assert found[name].startswith("model.policy.name: ")
        assert "acme/none" in found[name]
        assert "that this machine can reach" in " ".join(found[name].split())
    assert "data.train: the data set acme/none" in found["rows"]
    assert "Check the names and the network" in found["rows"]


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    from sdft_lightning.errors import UserError
    from sdft_lightning.files.checkpoint_io import load_checkpoint

    with pytest.raises(UserError, match=r"^ckpt_path: .* is a folder, and checkpoints are files"):
        load_checkpoint(tmp_path)
