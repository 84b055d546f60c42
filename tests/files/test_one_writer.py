"""One run, one writer: the second command in a run's folder gets a sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

from sdft_lightning.continual.checks import claim_folder
from sdft_lightning.continual.plan import plan_folder
from sdft_lightning.errors import UserError
from sdft_lightning.files import whole_files
from sdft_lightning.files.run_folder import LOCK, check_run_folder, named_folder, one_writer
from sdft_lightning.files.whole_files import held_lock, whole_file, whole_folder

RunCli = Callable[..., None]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
CLI = [sys.executable, "-m", "sdft_lightning.cli"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a lock here."""
    monkeypatch.setattr(whole_files, "_LOCK_PAUSE", 0.01)


def everything(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def trained(run_cli: RunCli, fit_args: list[str], tmp_path: Path) -> Path:
    """A run of two steps in runs/a."""
    run_cli(*fit_args)
    return tmp_path / "runs" / "a"


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "export", "preflight"])
def test_second_command_in_a_runs_folder_is_refused_and_changes_nothing(
    command: str,
    trained: Path,
    run_cli: RunCli,
    fit_args: list[str],
    train_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not (trained / LOCK).exists()
    splits = {"validate": "validation", "test": "test", "predict": "predict"}
    given = [f"--data.{splits[command]}={train_file}"] if command in splits else []
    given += [] if command == "preflight" else ["--ckpt_path=last"]
    with one_writer(trained):
        before = everything(trained)
        with pytest.raises(SystemExit) as stop:
            run_cli(command, *fit_args[1:], *given)
        assert everything(trained) == before
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"runs/a is being written into by process {os.getpid()} on" in message
    assert "--run.name" in message
    assert not (trained / LOCK).exists()


def test_new_run_is_refused_where_another_has_just_begun(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with one_writer(tmp_path / "runs" / "a"), pytest.raises(SystemExit):
        run_cli(*fit_args)
    assert "is being written into" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()  # neither of them wrote anything
    run_cli(*fit_args)


def test_refused_command_leaves_no_folder_behind(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        run_cli(*fit_args, "--data.train=absent.jsonl", "--run.root=deep/er", "--run.name=a/b")
    assert not (tmp_path / "deep").exists()


def test_other_ranks_of_the_same_command_need_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_writer(tmp_path / "a"):
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        check_run_folder(tmp_path / "a", None)  # the lock alone makes no run
        with one_writer(tmp_path / "a"):
            pass
        monkeypatch.setattr(rank_zero_only, "rank", 0)
        with pytest.raises(UserError, match="is being written into"), one_writer(tmp_path / "a"):
            pass


def test_lock_that_is_removed_while_another_waits_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_files, "_LOCK_PAUSE", 0.1)
    path, inside, most = tmp_path / "runs" / "a", [0], [0]

    def work() -> None:
        with one_writer(path):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            assert (path / LOCK).exists()
            time.sleep(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert not path.exists()


HOLDER = """
import sys, time
from pathlib import Path
from sdft_lightning.files.run_folder import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(trained: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes into the run's folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(trained)],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_killed_process_leaves_no_lock_behind(
    holder: subprocess.Popen[str], trained: Path, run_cli: RunCli, fit_args: list[str]
) -> None:
    with pytest.raises(SystemExit):
        run_cli(*fit_args, "--ckpt_path=last")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (trained / LOCK).exists()
    run_cli(*fit_args, "--ckpt_path=last", "--trainer.max_steps=3")
    assert not (trained / LOCK).exists()


@pytest.mark.slow
def test_of_two_new_runs_of_one_name_exactly_one_wins(fit_args: list[str], tmp_path: Path) -> None:
    pair = [
        subprocess.Popen(
            [*CLI, *fit_args], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    messages = [process.communicate(timeout=300)[1] for process in pair]
    codes = [process.returncode for process in pair]
    assert sorted(codes) == [0, 2], messages
    loser = messages[codes.index(2)]
    assert "is being written into" in loser or "already holds a run" in loser
    assert "Traceback" not in loser
    configs = [path.name for path in (tmp_path / "runs" / "a").glob("config*.yaml")]
    assert configs == ["config.yaml"]


def test_file_that_a_living_process_writes_is_not_cleared_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with whole_file(tmp_path / "last.ckpt") as file, whole_folder(tmp_path / "final") as folder:
        file.write(b"mine")
        (folder / "mine").touch()
        mine = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: mine + 1)  # as another process names its files
        with whole_file(tmp_path / "last.ckpt") as other:
            other.write(b"theirs")
        with pytest.raises(RuntimeError), whole_folder(tmp_path / "final"):
            raise RuntimeError
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            f".final.{mine}.part",
            f".last.ckpt.{mine}.part",
            "last.ckpt",
        ]
    assert (tmp_path / "last.ckpt").read_bytes() == b"mine"
    assert (tmp_path / "final" / "mine").exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "", ".", "a/../../evil", "a\0b", "a" * 300])
def test_no_name_leads_out_of_its_root(name: str) -> None:
    with pytest.raises(UserError, match=r"run\.name: got .*names no folder below run\.root"):
        named_folder("runs", name)
    plan: Any = SimpleNamespace(root="runs", name=name)
    with pytest.raises(UserError, match=r"^name: got .*names no folder below root .*--root"):
        plan_folder(plan)


def test_plan_of_another_content_does_not_take_a_folder_that_is_being_claimed(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "plan"
    with held_lock(folder / ".plan.json.lock", str):
        with pytest.raises(UserError, match="is making the folder"):
            claim_folder(folder, {"a": 1})
    refused: list[Exception] = []

    def claim(number: int) -> None:
        try:
            claim_folder(folder, {"a": number})
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
