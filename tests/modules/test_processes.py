"""The same global batch on one process and on two: completions, losses, weights, resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

# Lightning starts this script once more for each further process.
WORKER = """
import json, sys
from sdft_lightning.cli import main
from sdft_lightning.modules import SDFTModule

step = SDFTModule.training_step

def recorded(self, batch, batch_idx):
    outputs = step(self, batch, batch_idx)
    rollout = outputs["rollout"]
    name = f"{self.trainer.default_root_dir}/rank{self.global_rank}.jsonl"
    with open(name, "a") as file:
        for row, ids, mask in zip(batch.rows, rollout.completion_ids, rollout.completion_mask):
            record = [self.trainer.global_step, row.id, ids[mask].tolist()]
            file.write(json.dumps(record) + "\\n")
    return outputs

SDFTModule.training_step = recorded
main()
"""


@pytest.fixture
def fit(tmp_path: Path, model_folder: Path, train_file: Path) -> Any:
    """Runs `fit` in a process of its own, which starts the others, and returns its run folder."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")

    def run(name: str, devices: int, *more: str) -> Path:
        command = [
            sys.executable,
            str(script),
            "fit",
            "--model=SDFTModule",
            f"--model.model_name={model_folder}",
            "--model.sampling.max_new_tokens=6",
            "--model.optimizer=torch.optim.AdamW",
            "--model.optimizer.lr=1e-3",
            f"--data.train={train_file}",
            f"--data.batch_size={4 // devices}",
            "--data.prompts.style=turns",
            "--trainer.accelerator=cpu",
            f"--trainer.devices={devices}",
            "--trainer.max_steps=10",
            "--trainer.max_epochs=-1",
            "--trainer.log_every_n_steps=1",
            "--trainer.gradient_clip_val=1.0",
            f"--run.name={name}",
            *(["--trainer.strategy=ddp"] if devices > 1 else []),
            *more,
        ]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            timeout=280,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return tmp_path / "runs" / name

    return run


def completions(folder: Path) -> list[Any]:
    """(step, row id, tokens) of all ranks, in one order."""
    lines = [
        json.loads(line)
        for file in folder.rglob("rank*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(lines)


def losses(folder: Path) -> list[float]:
    (file,) = folder.rglob("metrics.jsonl")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [record["train/loss"] for record in records if record["stage"] == "train"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return state


def test_two_processes_do_what_one_does_with_the_same_global_batch(fit: Any) -> None:
    one, two = fit("one", 1), fit("two", 2)
    assert len(completions(two)) == 40
    assert completions(one) == completions(two)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert len(losses(two)) == 10
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert any(name.startswith("teacher.") for name in first)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-4)


def test_a_run_on_two_processes_goes_on_as_if_it_had_not_stopped(fit: Any) -> None:
    # Without a schedule that knows where the run ends, the first half is the same run cut short.
    constant = "--model.schedule.name=constant"
    straight = fit("whole", 2, constant)
    fit("halved", 2, constant, "--trainer.max_steps=6")
    halved = fit("halved", 2, constant, "--ckpt_path=last")
    assert completions(straight) == completions(halved)
    whole, resumed = weights(straight), weights(halved)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=0, rtol=0)
