"""A run's config: written once, and taken back where the run could not even start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunCli = Callable[..., None]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.optimizer=torch.optim.SparseAdam", "model.optimizer: SparseAdam takes sparse"),
        ("model.optimizer.lr=-1", "model.optimizer: it refuses its options: Invalid learning rate"),
        ("data.num_workers=-1", "data.num_workers: got -1, allowed are 0 and more"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val: got -1, allowed are 0"),
    ],
)
def test_option_that_lightning_and_torch_refuse_late_is_told_before_anything_is_written(
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: str,
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(*fit_args, f"--{wrong}")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_after_weights_that_do_not_fit_the_mended_command_may_have_the_same_name(
    run_cli: RunCli, fit_args: list[str], model_folder: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(model_folder, tmp_path / "copied")
    (copied / "model.safetensors").unlink()
    with pytest.raises((SystemExit, OSError)):
        run_cli(*fit_args, f"--model.policy.name={copied}")
    assert not (tmp_path / "runs" / "a").exists()
    run_cli(*fit_args)


def test_folder_is_kept_once_something_was_trained(
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaks.py").write_text(
        "import lightning as L\n"
        "class Breaks(L.Callback):\n"
        "    def __init__(self, hook: str) -> None:\n"
        "        def fail(*args): raise RuntimeError('in the middle')\n"
        "        setattr(self, hook, fail)\n"
    )
    breaks = "--trainer.callbacks+=breaks.Breaks"
    run = tmp_path / "runs" / "a"
    with pytest.raises(RuntimeError, match="in the middle"):
        run_cli(*fit_args, breaks, "--trainer.callbacks.hook=on_train_batch_start")
    assert not run.exists()
    with pytest.raises(RuntimeError, match="in the middle"):
        run_cli(*fit_args, breaks, "--trainer.callbacks.hook=on_train_epoch_end")
    assert (run / "config.yaml").exists()


def test_second_run_of_a_name_that_has_begun_meanwhile_is_refused(
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "runs" / "a"

    def meanwhile(*args: Any) -> None:
        run.mkdir(parents=True, exist_ok=True)  # the lock is in it
        (run / "config.yaml").write_text("of the other")

    # What `before_fit` does takes a while; the other process begins then.
    monkeypatch.setattr("sdft_lightning.modules.run_checks.check_run", meanwhile)
    with pytest.raises(SystemExit) as stop:
        run_cli(*fit_args, "--trainer.logger=false")
    assert stop.value.code == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == "of the other"
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
