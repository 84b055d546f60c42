"""No checkpoint holds half an accumulation window, whatever asks for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft_lightning.errors import UserError
from sdft_lightning.files.whole_windows import WindowCheckpoint, check_whole_windows

RunCli = Callable[..., None]


@pytest.fixture
def windows(fit_args: list[str], train_file: Path) -> Callable[..., list[str]]:
    """A fit with windows of two micro-batches and validations, which moves its weights far."""

    def args(name: str, *more: str) -> list[str]:
        return [
            *fit_args,
            "--trainer.accumulate_grad_batches=2",
            "--trainer.logger=false",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.limit_val_batches=1",
            "--model.evaluation.max_new_tokens=2",
            "--model.schedule.name=constant",
            "--model.optimizer.class_path=torch.optim.SGD",
            "--model.optimizer.init_args.lr=0.5",
            f"--data.validation={train_file}",
            "--checkpoint.save_top_k=-1",
            f"--run.name={name}",
            *more,
        ]

    return args


def saved(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def checkpoints(run: Path) -> dict[str, dict[str, Any]]:
    return {path.name: saved(path) for path in sorted((run / "checkpoints").glob("*.ckpt"))}


def finished_batches(checkpoint: dict[str, Any]) -> int:
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    return int(progress["processed"])


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = (saved(run / "checkpoints" / "last.ckpt") for run in (one, other))
    assert mine["global_step"] == theirs["global_step"]
    assert mine["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in theirs["state_dict"].items():
        assert torch.equal(mine["state_dict"][name], value), name


# Six micro-batches an epoch in windows of two, unless the rows are changed.
REFUSED = {
    "not_a_multiple": (["--trainer.val_check_interval=3"], ["got 3", "micro-batch 3 of 6", "2 or"]),
    "counted_over_epochs": (
        ["--trainer.val_check_interval=3", "--trainer.check_val_every_n_epoch=null"],
        ["got 3", "Set it to 2 or 4."],
    ),
    "fraction": (["--trainer.val_check_interval=0.5"], ["got 0.5", "micro-batch 3 of 6", "4 or"]),
    "below_the_first_multiple": (["--trainer.val_check_interval=1"], ["got 1", "Set it to 2 or 1"]),
    "odd_epochs_shift_the_windows": (
        [
            "--data.batch_size=4",
            "--trainer.val_check_interval=2",
            "--trainer.check_val_every_n_epoch=null",
            "--trainer.max_steps=4",
        ],
        ["micro-batch 1 of 3", "check_val_every_n_epoch null", "Set it to 1"],
    ),
    "by_the_clock": (["--trainer.val_check_interval=00:00:05:00"], ["a duration", "multiple of 2"]),
    "on_exception": (["--checkpoint.save_on_exception=true"], ["save_on_exception", "got true"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_save_inside_a_window_are_refused_before_anything_is_loaded_or_written(
    name: str,
    run_cli: RunCli,
    windows: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, words = REFUSED[name]
    monkeypatch.setattr("sdft_lightning.modules.base.load_policy", pytest.fail)
    with pytest.raises(SystemExit) as stop:
        run_cli(*windows("a", *options))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    for word in [*words, "trainer.accumulate_grad_batches"]:
        assert word in message, message
    assert not list(tmp_path.glob("runs/**/*.*"))


def trainer_of(window: int, interval: int | float, every: int | None, epochs: int) -> Any:
    return SimpleNamespace(
        accumulate_grad_batches=window,
        val_check_interval=interval,
        check_val_every_n_epoch=every,
        max_epochs=epochs,
        max_steps=-1,
        limit_train_batches=1.0,
        limit_val_batches=1.0,
        checkpoint_callbacks=[],
    )


def test_check_agrees_with_lightnings_own_counting() -> None:
    for window, batches, interval, every in itertools.product(
        (2, 3), range(1, 8), range(1, 8), (None, 1)
    ):
        inside, total = False, 0
        for _, place in itertools.product(range(4), range(1, batches + 1)):
            total += 1
            validates = (total if every is None else place) % interval == 0
            inside |= validates and place % window != 0 and place != batches
        trainer = trainer_of(window, interval, every, epochs=4)
        try:
            check_whole_windows(trainer, batches)
            refused = False
        except UserError:
            refused = True
        assert refused == inside, (window, batches, interval, every)


def test_validations_that_never_come_are_not_refused() -> None:
    trainer = trainer_of(2, 3, 1, epochs=1)
    trainer.limit_val_batches = 0
    check_whole_windows(trainer, 6)


def test_lightnings_own_checkpoint_by_the_clock_is_refused_where_windows_have_several_batches(
    fit_module: Callable[..., Any], tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, train_time_interval=timedelta(0))
    options = {"enable_checkpointing": True, "callbacks": [saver]}
    with pytest.raises(UserError, match=r"train_time_interval.*WindowCheckpoint"):
        fit_module(accumulate_grad_batches=2, **options)
    fit_module(**options)


def test_checkpoints_by_the_clock_wait_for_the_windows_end_and_are_gone_on_from_exactly(
    run_cli: RunCli, windows: Callable[..., list[str]], tmp_path: Path
) -> None:
    # Due after each micro-batch.
    clock = ["--checkpoint.train_time_interval=0:00:00", "--trainer.max_steps=5"]
    run_cli(*windows("whole", *clock))
    whole = tmp_path / "runs" / "whole"
    found = checkpoints(whole)
    assert {name: finished_batches(each) for name, each in found.items()} == {
        "step-1.ckpt": 2,
        "step-2.ckpt": 4,
        "step-3.ckpt": 6,
        "step-4.ckpt": 2,
        "step-5.ckpt": 4,
        "last.ckpt": 4,
    }
    run_cli(*windows("parts", *clock), f"--ckpt_path={whole / 'checkpoints' / 'step-2.ckpt'}")
    assert_same_weights(tmp_path / "runs" / "parts", whole)


def test_resumed_run_does_not_save_its_first_micro_batch_under_the_step_it_came_from(
    run_cli: RunCli, windows: Callable[..., list[str]], tmp_path: Path
) -> None:
    every = "--checkpoint.every_n_train_steps=2"
    run_cli(*windows("a", every))
    run_cli(*windows("a", every, "--trainer.max_steps=5", "--ckpt_path=last"))
    found = checkpoints(tmp_path / "runs" / "a")
    assert sorted(found) == ["last.ckpt", "step-2.ckpt", "step-4.ckpt"]
    assert finished_batches(found["step-2.ckpt"]) == 4


def test_stop_inside_a_window_waits_for_the_optimizer_and_is_gone_on_from_exactly(
    run_cli: RunCli,
    windows: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Lightning's max_time, without waiting for it: the clock runs out in the third micro-batch.
    (tmp_path / "stopper.py").write_text(
        "import lightning as L\n\n\nclass StopAt(L.Callback):\n"
        "    def on_train_batch_end(self, trainer, *args) -> None:\n"
        "        trainer.should_stop |= trainer.fit_loop.total_batch_idx == 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    steps = "--trainer.max_steps=4"
    run_cli(*windows("parts", steps, "--trainer.callbacks+=stopper.StopAt"))
    last = saved(tmp_path / "runs" / "parts" / "checkpoints" / "last.ckpt")
    assert (last["global_step"], finished_batches(last)) == (2, 4)
    run_cli(*windows("parts", steps, "--ckpt_path=last"))
    run_cli(*windows("whole", steps))
    assert_same_weights(tmp_path / "runs" / "parts", tmp_path / "runs" / "whole")


@pytest.mark.parametrize("interval", ["1.0", "2", "3"])
def test_checkpoint_at_the_end_of_an_epoch_with_a_shorter_last_window_is_gone_on_from_exactly(
    interval: str, run_cli: RunCli, windows: Callable[..., list[str]], tmp_path: Path
) -> None:
    # Three micro-batches: a window of two and one of one, at which Lightning steps as well.
    options = ["--data.batch_size=4", "--trainer.max_steps=-1"]
    options += [f"--trainer.val_check_interval={interval}"]
    run_cli(*windows("whole", *options, "--trainer.max_epochs=2"))
    run_cli(*windows("parts", *options, "--trainer.max_epochs=1"))
    run_cli(*windows("parts", *options, "--trainer.max_epochs=2", "--ckpt_path=last"))
    whole = tmp_path / "runs" / "whole"
    assert_same_weights(tmp_path / "runs" / "parts", whole)
    assert saved(whole / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert all(finished_batches(each) in (2, 3) for each in checkpoints(whole).values())


def test_state_of_the_checkpoint_is_found_under_lightnings_name() -> None:
    assert WindowCheckpoint().state_key == ModelCheckpoint().state_key


@pytest.mark.parametrize(
    ("path", "removed"),
    [
        ("checkpoints/step-1.ckpt", True),
        ("checkpoints/below/step-1.ckpt", True),
        ("checkpoints/../config.yaml", False),
        ("checkpoints/..", False),
        ("config.yaml", False),
        ("s3://bucket/step-1.ckpt", False),
    ],
)
def test_nothing_outside_the_runs_checkpoints_is_removed_whatever_a_state_names(
    path: str, removed: bool, tmp_path: Path
) -> None:
    saver = WindowCheckpoint(tmp_path / "checkpoints")
    trainer: Any = SimpleNamespace(ckpt_path=None)
    named = path if "://" in path else str(tmp_path / path)
    current = str(tmp_path / "checkpoints" / "step-2.ckpt")
    assert saver._should_remove_checkpoint(trainer, named, current) is removed


def test_fit_without_windows_ends_where_it_is_told(fit_module: Callable[..., Any]) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    assert fit_module(max_steps=4, callbacks=[Stop()]).trainer.global_step == 2
