"""Checkpoints every n steps: the steps behind the last of them are saved, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def last(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "runs" / name / "checkpoints" / "last.ckpt"
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    assert not list(path.parent.glob("last-v*"))
    return checkpoint


def test_last_checkpoint_is_the_end_of_the_epoch_and_a_longer_run_goes_on_from_it(
    run_cli: Callable[..., None], fit_args: list[str], tmp_path: Path
) -> None:
    # Six steps an epoch: a checkpoint each fourth leaves the last two out.
    options = [
        *fit_args,
        "--trainer.max_steps=-1",
        "--checkpoint.every_n_train_steps=4",
        "--model.schedule.name=constant",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.lr=1e-2",
        "--trainer.logger=false",
    ]
    run_cli(*options, "--trainer.max_epochs=1")
    assert last(tmp_path, "a")["global_step"] == 6
    run_cli(*options, "--trainer.max_epochs=2", "--ckpt_path=last")
    run_cli(*options, "--trainer.max_epochs=2", "--run.name=b")
    halved, straight = last(tmp_path, "a"), last(tmp_path, "b")
    assert halved["global_step"] == straight["global_step"] == 12
    assert halved["state_dict"].keys() == straight["state_dict"].keys()
    for name, value in straight["state_dict"].items():
        assert torch.equal(halved["state_dict"][name], value), name
