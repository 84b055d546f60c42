"""No checkpoint and no export holds a weight that is no number; the last good one stays."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft_lightning.callbacks import ExportModel
from sdft_lightning.callbacks.export import export_model
from sdft_lightning.errors import UserError
from sdft_lightning.files.checkpoint_io import (
    has_finite_weights,
    last_good_checkpoint,
    non_finite,
)
from sdft_lightning.modules import SDFTModule, SFTModule

pytestmark = pytest.mark.attack

FitModule = Callable[..., Any]


class Break(L.Callback):
    """Puts a value into a weight of the student, its teacher or its optimizer after two steps."""

    def __init__(self, what: str, value: float) -> None:
        self.what = what
        self.value = value

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step != 2:
            return
        broken = {
            "student": lambda: next(module.student.parameters()),
            "teacher": lambda: next(module.teacher.network.parameters()),
            "optimizer": lambda: next(iter(trainer.optimizers[0].state.values()))["exp_avg_sq"],
        }[self.what]()
        broken.data.view(-1)[3] = self.value


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("student", math.nan),
        ("student", -math.inf),
        ("teacher", math.nan),
        ("optimizer", math.inf),
    ],
)
@pytest.mark.parametrize("monitor", [None, "train/loss"])
def test_broken_weights_end_the_run_and_the_last_good_checkpoint_is_named_and_stays(
    what: str, value: float, monitor: str | None, fit_module: FitModule, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    options = {"monitor": monitor, "save_last": True, "every_n_train_steps": 1}
    saver = ModelCheckpoint(folder, "step-{step}", save_top_k=1, **options)
    with pytest.raises(UserError, match="no checkpoint is written") as error:
        fit_module(max_steps=5, enable_checkpointing=True, callbacks=[Break(what, value), saver])
    text = str(error.value)
    assert text.startswith("step 2: ")
    assert f"{what}." in text or f"the {what}'s exp_avg_sq" in text
    assert f"The last good one is {folder / 'last.ckpt'}" in text
    assert f"go on with --ckpt_path={folder / 'last.ckpt'}" in text
    assert "gradient_clip_val" in text
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-step=1.ckpt"]
    for path in folder.iterdir():
        assert torch.load(path, weights_only=True)["global_step"] == 1
        assert has_finite_weights(path)


def test_first_checkpoint_that_is_refused_says_that_there_is_none(
    fit_module: FitModule, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2)
    with pytest.raises(UserError, match="The last good one is none: there was none before"):
        fit_module(
            SFTModule,
            max_steps=2,
            enable_checkpointing=True,
            callbacks=[Break("student", math.nan), saver],
        )
    assert not list(tmp_path.rglob("*.ckpt"))


def test_every_way_of_saving_is_refused(fit_module: FitModule, tmp_path: Path) -> None:
    module = fit_module(SFTModule)
    next(module.student.parameters()).data.view(-1)[0] = math.nan
    for weights_only in (False, True):
        with pytest.raises(UserError, match="no checkpoint is written"):
            module.trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only)
    assert not (tmp_path / "a.ckpt").exists()


def test_model_with_broken_weights_is_not_exported(fit_module: FitModule, tmp_path: Path) -> None:
    module = fit_module(SFTModule)
    export_model(module, tmp_path / "good")
    with pytest.raises(UserError, match=r"model.* NaN or infinity.*, so nothing is exported"):
        fit_module(SFTModule, max_steps=2, callbacks=[Break("student", math.nan), ExportModel()])
    assert not (tmp_path / "exported" / "final").exists()
    assert (tmp_path / "good").is_dir()


def test_command_says_it_in_a_sentence_and_the_run_goes_on_from_what_it_names(
    run_cli: Callable[..., None],
    fit_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(module: Any, optimizer: Any) -> None:
        if module.trainer.global_step == 2:
            next(module.student.parameters()).grad.view(-1)[0] = math.nan

    every = ["--checkpoint.every_n_train_steps=1", "--trainer.max_steps=4"]
    with monkeypatch.context() as patch:
        patch.setattr(SDFTModule, "on_before_optimizer_step", broken)
        with pytest.raises(SystemExit) as stop:
            run_cli(*fit_args, *every)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in error
    assert "error: step 3: student." in error
    run_cli(*fit_args, *every, "--ckpt_path=last")
    last = torch.load(tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4


def test_whole_numbers_empty_tensors_and_large_values_pass() -> None:
    named = {
        "int": torch.ones(2).long(),
        "empty": torch.ones(0),
        "large": torch.full((9,), 3e38),
        "half": torch.full((2,), 6e4, dtype=torch.float16),
        "bfloat16": torch.full((2,), 3e38, dtype=torch.bfloat16),
        "float64": torch.full((2,), 1e300, dtype=torch.float64),
        "number": 3,
    }
    assert non_finite(named.items()) == []
    named["half"][1] = math.inf
    named["bfloat16"][0] = math.nan
    assert non_finite(named.items()) == ["half", "bfloat16"]


def test_spoilt_files_beside_the_last_good_checkpoint_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save({"state_dict": {"w": torch.zeros(2)}}, folder / "good.ckpt")
    for name, content in (("list", [1]), ("weights", {"state_dict": 7}), ("none", None)):
        torch.save(content, folder / f"{name}.ckpt")
    raw = bytearray((folder / "good.ckpt").read_bytes())
    raw[200:400] = b"\xff" * 200
    (folder / "torn.ckpt").write_bytes(raw)
    os.utime(folder / "good.ckpt", (1, 1))
    trainer = SimpleNamespace(checkpoint_callbacks=[], default_root_dir=str(tmp_path))
    assert last_good_checkpoint(trainer) == folder / "good.ckpt"
