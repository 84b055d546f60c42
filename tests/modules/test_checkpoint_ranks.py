"""A checkpoint that is ranked by a validation's metric has that of its own step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

METRIC = "val/drift/gen"


@pytest.fixture
def ranked(fit_args: list[str], train_file: Path) -> Callable[..., list[str]]:
    """A fit of 8 steps, a validation and a checkpoint after every second."""

    def args(name: str, *more: str) -> list[str]:
        held_out = {"gen": {"source": str(train_file), "grader": "exact"}}
        return [
            *fit_args,
            f"--run.name={name}",
            "--model.optimizer.lr=0.05",
            "--model.evaluation.max_new_tokens=6",
            f"--data.held_out={json.dumps(held_out)}",
            "--trainer.callbacks+=DriftMonitor",
            "--trainer.callbacks.held_out=[gen]",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.max_steps=8",
            "--trainer.max_epochs=-1",
            f"--checkpoint.monitor={METRIC}",
            "--checkpoint.save_top_k=-1",
            "--checkpoint.every_n_train_steps=2",
            *more,
        ]

    return args


def measured(run: Path) -> dict[int, float]:
    """The metric by step, as `metrics.jsonl` has it."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    return {each["step"]: each[METRIC] for each in records if METRIC in each}


def checkpoint_state(path: Path) -> dict[str, Any]:
    callbacks = torch.load(path, weights_only=True)["callbacks"]
    [state] = [state for name, state in callbacks.items() if name.startswith("ModelCheckpoint")]
    return dict(state)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_each_checkpoint_is_ranked_by_the_validation_of_its_step(
    mode: str, run_cli: Callable[..., None], ranked: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_cli(
        *ranked(
            "a",
            f"--checkpoint.mode={mode}",
            "--trainer.val_check_interval=2",
            "--trainer.check_val_every_n_epoch=null",
        )
    )
    run = tmp_path / "runs" / "a"
    figures = measured(run)
    state = checkpoint_state(run / "checkpoints" / "last.ckpt")
    ranks = {Path(path).stem: float(score) for path, score in state["best_k_models"].items()}
    assert len(set(figures.values())) == 4  # or nothing here could fail
    assert ranks == {f"step-{step}": pytest.approx(figures[step]) for step in (2, 4, 6, 8)}
    best = {"min": min, "max": max}[mode](figures, key=lambda step: figures[step])
    assert Path(state["best_model_path"]).stem == f"step-{best}"


def test_steps_without_a_validation_are_saved_when_they_are_due(
    run_cli: Callable[..., None], ranked: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_cli(
        *ranked("a", "--trainer.val_check_interval=4", "--trainer.check_val_every_n_epoch=null")
    )
    run = tmp_path / "runs" / "a"
    figures = measured(run)
    ranks = checkpoint_state(run / "checkpoints" / "last.ckpt")["best_k_models"]
    found = {Path(path).stem: float(score) for path, score in ranks.items()}
    # Step 2 waits for the first validation, after step 4; step 6 has the newest figure there is.
    wanted = {"step-4": figures[4], "step-6": figures[4], "step-8": figures[8]}
    assert found == {name: pytest.approx(value) for name, value in wanted.items()}


def test_a_run_goes_on_from_such_a_checkpoint_as_if_it_had_not_stopped(
    run_cli: Callable[..., None], ranked: Callable[..., list[str]], tmp_path: Path
) -> None:
    options = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    run_cli(*ranked("whole", *options))
    whole = tmp_path / "runs" / "whole"
    middle = whole / "checkpoints" / "step-4.ckpt"
    run_cli(*ranked("resumed", *options, f"--ckpt_path={middle}"))
    mine, theirs = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        for run in (whole, tmp_path / "runs" / "resumed")
    )
    assert mine["global_step"] == theirs["global_step"] == 8
    for name, value in mine["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name]), name
    assert measured(tmp_path / "runs" / "resumed") == {
        step: value for step, value in measured(whole).items() if step > 4
    }
