"""Runs of the command line in processes of their own, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
    if sys.flags.optimize:
        open(f"{self.trainer.default_root_dir}/optimized{self.global_rank}", "w").close()
    return outputs

SDFTModule.training_step = recorded
main()
"""


class Run:
    """What a run left in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def completions(self) -> list[Any]:
        """(step, row id, tokens) of all ranks, in one order."""
        lines = [
            json.loads(line)
            for file in self.folder.rglob("rank*.jsonl")
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        return sorted(lines)

    def optimized(self) -> list[str]:
        """Of each process that ran without asserts, the name of the file that says so."""
        return sorted(file.name for file in self.folder.rglob("optimized*"))

    def logged(self, name: str, stage: str = "train") -> list[float]:
        """The values of a metric, step by step."""
        (file,) = self.folder.glob("metrics.jsonl")
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [r[name] for r in records if r["stage"] == stage and name in r]

    def keys(self, stage: str) -> list[str]:
        """The names of all that was logged."""
        (file,) = self.folder.glob("metrics.jsonl")
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return sorted({name for r in records if r["stage"] == stage for name in r})

    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the newest checkpoint."""
        path = self.folder / "checkpoints" / "last.ckpt"
        state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
        return state


@pytest.fixture(scope="module")
def process_folder(
    tmp_path_factory: pytest.TempPathFactory, make_rows: Callable[[int], list[dict[str, Any]]]
) -> Path:
    """The folder that the runs of a test file share, with twelve training rows."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    rows = "".join(json.dumps(row) + "\n" for row in make_rows(12))
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def command(process_folder: Path, model_folder: Path) -> Callable[..., Run]:
    """Runs a command in a process of its own, which starts the others, and returns its run."""

    def run(command: str, name: str, devices: int, *more: str, optimized: bool = False) -> Run:
        arguments = [
            command,
            "--model=SDFTModule",
            f"--model.policy.name={model_folder}",
            "--data.train=train.jsonl",
            f"--data.batch_size={4 // devices}",
            "--data.prompts.style=turns",
            # A bfloat16 copy's completions differ with the batch.
            "--model.policy.sampling_dtype=same",
            "--trainer.accelerator=cpu",
            f"--trainer.devices={devices}",
            f"--run.name={name}",
        ]
        given = [sys.executable, "worker.py", *arguments, *more]
        # As -O, also for the processes that Lightning starts.
        _run_group(given, process_folder, {"PYTHONOPTIMIZE": "1"} if optimized else {})
        return Run(process_folder / "runs" / name)

    return run


@pytest.fixture(scope="module")
def fit(command: Callable[..., Run]) -> Callable[..., Run]:
    """Runs `fit` of SDFT for ten steps on so many processes; one that was made is not repeated."""
    known: dict[str, Run] = {}

    def run(
        name: str, devices: int, *more: str, strategy: str = "ddp", optimized: bool = False
    ) -> Run:
        arguments = [
            # With 42 a uniform number of step 7 falls on a token's boundary, within rounding, and
            # the completion differs between one process and two: no property of either.
            "--seed_everything=11",
            "--model.sampling.max_new_tokens=6",
            "--model.optimizer=torch.optim.AdamW",
            "--model.optimizer.lr=1e-3",
            # Without a schedule that knows where the run ends, half a run is the run cut short.
            "--model.schedule.name=constant",
            "--trainer.max_steps=10",
            "--trainer.max_epochs=-1",
            "--trainer.log_every_n_steps=1",
            "--trainer.gradient_clip_val=1.0",
            *([f"--trainer.strategy={strategy}"] if devices > 1 else []),
            *more,
        ]
        key = repr((name, devices, arguments, optimized))
        if key not in known:
            known[key] = command("fit", name, devices, *arguments, optimized=optimized)
        return known[key]

    return run


def _run_group(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command to its end; one that hangs is stopped together with its children."""
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        output, errors = process.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
    assert process.returncode == 0, output[-2000:] + errors[-4000:]
