"""A run that is killed and resumed ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Forks a process for each list of arguments that it reads, and answers with its wait status.
LAUNCHER = """
import json, os, sys, torch
torch.set_num_threads(1)
from sdft_lightning.cli import main
for line in sys.stdin:
    folder, args = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.dup2(2, 1)
        main(args)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""

KILLER = """
import os, signal
import lightning as L

class KillAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
"""

Launcher = Callable[[Path, list[str]], int]

# Rows of the training file, and options.
VARIANTS: dict[str, tuple[int, list[str]]] = {
    "mid_epoch": (30, []),
    "checkpoint_at_the_end_of_an_epoch": (12, []),
    "epoch_boundary_before_the_kill": (10, []),
    "validation_between_epochs": (10, ["--data.validation=rows.jsonl", "--data.grader=contains"]),
    "accumulate_2": (30, ["--trainer.accumulate_grad_batches=2"]),
    "accumulate_2_with_odd_windows": (10, ["--trainer.accumulate_grad_batches=2"]),
    "worker": (10, ["--data.num_workers=1"]),
    "frozen": (30, ["--model.teacher=FrozenTeacher"]),
    "frozen_cached": (
        10,
        ["--model.teacher=FrozenTeacher", "--model.teacher.cache_prompts=true"],
    ),
    "ema_every_3": (
        30,
        ["--model.teacher=EMATeacher", "--model.teacher.every=3", "--model.teacher.update_rate=.2"],
    ),
    "live": (30, ["--model.teacher=LiveTeacher"]),
    "two_completions": (30, ["--model.sampling.completions_per_prompt=2"]),
    "retained": (
        30,
        ["--data.retain=rows.jsonl", "--data.batch_size=3", "--model.initial_copy=true"],
    ),
    "sft": (30, ["--model=SFTModule"]),
    "dft": (10, ["--model=DFTModule"]),
    "cpt": (10, ["--model=CPTModule", "--data.columns.context=context"]),
    "sft_kl": (10, ["--model=SFTKLModule", "--model.kl_weight=0.5"]),
    "reinvoke": (10, ["--model=ReinvokeModule", "--model.original.name=./original"]),
    # Killed in the second epoch: the text of the first comes out of the checkpoint.
    "offline": (10, ["--model=OfflineDistillationModule"]),
    "lora": (10, ["--model.policy.lora.r=4", "--trainer.accumulate_grad_batches=2"]),
    "lora_frozen_cached": (
        10,
        [
            "--model.policy.lora.r=4",
            "--model.teacher=FrozenTeacher",
            "--model.teacher.cache_prompts=true",
        ],
    ),
    "low_memory": (10, ["--model.policy.weights_dtype=bfloat16"]),
}
# Rounds stochastically; named behind the other options, since later ones win.
LOW_MEMORY = [
    "--model.optimizer=sdft_lightning.models.low_memory.LowMemoryAdamW",
    "--model.optimizer.lr=0.01",
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Run the command line in a process of its own; the imports are paid for once."""
    folder = tmp_path_factory.mktemp("killer")
    (folder / "killer.py").write_text(KILLER)
    repository = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(folder), str(repository)])
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    send, answers = process.stdin, process.stdout

    def run(where: Path, args: list[str]) -> int:
        send.write(json.dumps([str(where), args]) + "\n")
        send.flush()
        return int(answers.readline())

    yield run
    send.close()
    process.wait(timeout=30)


def run_args(model_folder: Path, name: str, extra: list[str]) -> list[str]:
    """Twelve steps; a checkpoint at every second, the completions of all."""
    samples = not any(f"--model={name}" in extra for name in SUPERVISED)
    return [
        "fit",
        "--model=SDFTModule",
        *extra,
        f"--model.policy.name={model_folder}",
        *(["--model.sampling.max_new_tokens=8"] if samples else []),
        "--model.evaluation.max_new_tokens=8",
        "--model.optimizer=AdamW",
        "--model.optimizer.lr=0.01",
        "--model.schedule.warmup_steps=3",
        "--data.train=rows.jsonl",
        "--data.columns.reference=reference",
        "--data.prompts.style=turns",
        "--data.batch_size=2",
        "--trainer.max_steps=12",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_model_summary=false",
        "--checkpoint.every_n_train_steps=2",
        "--checkpoint.save_top_k=-1",
        "--trainer.callbacks+=CompletionLog",
        "--trainer.callbacks.every_n_steps=1",
        f"--run.name={name}",
        *(LOW_MEMORY if "--model.policy.weights_dtype=bfloat16" in extra else []),
    ]


# Without completions to sample or to compare.
SUPERVISED = ["SFTModule", "DFTModule", "CPTModule", "SFTKLModule"]

# Rarer than the rest, and much like one of them.
SLOW = {
    "checkpoint_at_the_end_of_an_epoch",
    "epoch_boundary_before_the_kill",
    "accumulate_2",
    "frozen",
    "live",
    "two_completions",
    "sft",
    "dft",
    "cpt",
    "sft_kl",
    "reinvoke",
    "lora_frozen_cached",
}

KILL = ["--trainer.callbacks+=killer.KillAt", "--trainer.callbacks.step=7"]


def training_lines(run: Path) -> list[dict[str, Any]]:
    lines = (run / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["stage"] == "train"]


def assert_same(found: Any, expected: Any, where: str) -> None:
    """Equal tensors, bit for bit, and equal everything else."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for place, item in enumerate(expected):
            assert_same(found[place], item, f"{where}[{place}]")
    else:
        assert found == expected, where


def assert_same_checkpoints(parts: Path, whole: Path) -> None:
    for step in (8, 10, 12):
        found, expected = (
            torch.load(run / "checkpoints" / f"step-{step}.ckpt", weights_only=True)
            for run in (parts, whole)
        )
        keys = {"state_dict", "optimizer_states", "lr_schedulers", "sdft_lightning_completions"}
        for key in sorted(keys & expected.keys()):
            assert_same(found[key], expected[key], f"step {step}: {key}")
    first = torch.load(whole / "checkpoints" / "step-2.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(first[name], expected["state_dict"][name]) for name in first)


def assert_same_completions(parts: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    """The killed run wrote steps 1 to 6, or 7 if it got that far; the resumed one 7 to 12."""
    assert {line["step"] for line in whole} == set(range(1, 13))
    before = [line for line in whole if line["step"] <= 6]
    after = [line for line in whole if line["step"] >= 7]
    assert parts[: len(before)] == before
    assert parts[-len(after) :] == after
    twice = parts[len(before) : -len(after)]
    assert twice in ([], [line for line in after if line["step"] == 7])


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VARIANTS],
)
def test_killed_and_resumed_equals_uninterrupted(
    variant: str,
    launch: Launcher,
    run_cli: Callable[..., None],
    model_folder: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
    make_model_folder: Callable[..., Path],
) -> None:
    count, extra = VARIANTS[variant]
    make_model_folder("original", seed=1)
    write_rows(make_rows(count))
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    run_cli(*run_args(model_folder, "whole", extra))

    killed = launch(tmp_path, [*run_args(model_folder, "parts", extra), *KILL])
    assert os.WIFSIGNALED(killed)
    assert os.WTERMSIG(killed) == 9
    assert not (parts / "checkpoints" / "step-8.ckpt").exists()
    last = torch.load(parts / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    run_cli(*run_args(model_folder, "parts", extra), "--ckpt_path=last")

    assert_same_checkpoints(parts, whole)
    if not any(f"--model={name}" in extra for name in SUPERVISED):
        assert_same_completions(training_lines(parts), training_lines(whole))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_ended_with_an_epoch_goes_on_with_the_next_epoch(
    workers: int,
    run_cli: Callable[..., None],
    model_folder: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
) -> None:
    # Lightning's own end of an epoch, not a kill: the checkpoint is written when the epoch is
    # processed but not completed.
    write_rows(make_rows(6))
    more = [f"--data.num_workers={workers}", "--model.schedule.name=constant"]
    every_epoch = ["--checkpoint.every_n_train_steps=null", "--checkpoint.every_n_epochs=1"]
    run_cli(*run_args(model_folder, "whole", more), *every_epoch)
    run_cli(*run_args(model_folder, "parts", more), *every_epoch, "--trainer.max_steps=6")
    run_cli(*run_args(model_folder, "parts", more), *every_epoch, "--ckpt_path=last")
    whole, parts = (training_lines(tmp_path / "runs" / name) for name in ("whole", "parts"))
    assert {line["step"] for line in whole} == set(range(1, 13))
    assert parts == whole
    found, expected = (
        torch.load(tmp_path / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("parts", "whole")
    )
    assert_same(found["state_dict"], expected["state_dict"], "last")
