"""Options of Lightning's Trainer do here what they do there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

RunCli = Callable[..., None]


def files(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.rglob(pattern))


def test_log_every_0_steps_is_never(run_cli: RunCli, fit_args: list[str], tmp_path: Path) -> None:
    run_cli(*fit_args, "--trainer.log_every_n_steps=0")
    run = tmp_path / "runs" / "a"
    assert files(run, "last.ckpt") == ["last.ckpt"]
    assert not (run / "metrics.jsonl").exists()


def test_without_a_progress_bar_nothing_is_printed_of_the_steps(
    run_cli: RunCli, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli(*fit_args, "--trainer.enable_progress_bar=false")
    assert "step 1" not in capsys.readouterr().out
    run_cli(*fit_args, "--run.name=b")
    assert "step 1" in capsys.readouterr().out


def test_without_checkpoints_none_is_written(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path
) -> None:
    run_cli(*fit_args, "--trainer.enable_checkpointing=false", "--trainer.log_every_n_steps=1")
    run = tmp_path / "runs" / "a"
    assert files(run, "*.ckpt") == []
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    assert steps == [1, 2]


def test_run_without_an_end_has_a_constant_rate_and_says_no_total(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli(
        *fit_args,
        "--model.schedule.name=constant",
        "--model.optimizer.lr=0.001",
        "--trainer.max_steps=-1",
        "--trainer.max_epochs=-1",
        "--trainer.max_time=00:00:00:05",
        "--trainer.limit_val_batches=0",
    )
    shown = capsys.readouterr().out
    assert "step 1  " in shown
    assert " left " not in shown
    saved = torch.load(tmp_path / "runs/a/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] > 6  # more than the one epoch that a rate would be planned for
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.001


@pytest.mark.parametrize(("steps", "told"), [(2, True), (1, False)])
def test_a_warm_up_longer_than_the_run_is_told(
    steps: int,
    told: bool,
    run_cli: RunCli,
    fit_args: list[str],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_cli(*fit_args, f"--model.schedule.warmup_steps={steps}")
    message = f"model.schedule.warmup_steps: got {steps}, and the run has 2 steps"
    assert (message in capsys.readouterr().err + caplog.text) is told


def test_planned_rate_without_an_end_is_refused_before_the_model_is_loaded(
    run_cli: RunCli, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdft_lightning.modules.base.load_policy", pytest.fail)
    with pytest.raises(SystemExit) as stop:
        run_cli(*fit_args, "--trainer.max_steps=-1", "--trainer.max_epochs=-1")
    assert stop.value.code == 2
