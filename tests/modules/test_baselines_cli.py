"""Each baseline through the command line, from its fragment: log, checkpoint, export, resume."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RunCli = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]
FRAGMENTS = ROOT / "configs" / "model"

GIVEN = {"loss", "effective_update", "cross_entropy", "student_entropy", "completion_length"}
SAMPLED = {
    "loss",
    "kl",
    "effective_update",
    "student_entropy",
    "teacher_entropy",
    "top1_agreement",
    "completion_length",
    "truncated_fraction",
    "distinct_2",
    "teacher_distance",
}
# Fragment -> method, what it logs under train/, and the parts of its checkpoint.
METHODS: dict[str, tuple[str, set[str], set[str]]] = {
    "dft": ("DFTModule", GIVEN, {"student"}),
    "cpt": ("CPTModule", GIVEN, {"student"}),
    "sft_kl": ("SFTKLModule", GIVEN | {"kl"}, {"student", "base"}),
    "offline": ("OfflineDistillationModule", SAMPLED, {"student", "teacher"}),
    "reinvoke": ("ReinvokeModule", SAMPLED, {"student", "teacher"}),
    "sdft_frozen": ("SDFTModule", SAMPLED, {"student", "teacher"}),
    "sdft_ema": ("SDFTModule", SAMPLED | {"effective_teacher_update"}, {"student", "teacher"}),
    "sdft_live": ("SDFTModule", SAMPLED, {"student"}),
}


@pytest.fixture
def fit_of(
    model_folder: Path, train_file: Path, make_model_folder: Callable[..., Path]
) -> Callable[..., list[str]]:
    """A fit of three steps with a fragment, on the tiny model."""

    def args(fragment: str, *extra: str) -> list[str]:
        found = [
            "fit",
            f"--config={FRAGMENTS / fragment}.yaml",
            f"--model.policy.name={model_folder}",
            "--model.evaluation.max_new_tokens=4",
            f"--data.train={train_file}",
            "--data.columns={reference: reference, context: context, id: id}",
            "--data.prompts.style=turns",
            "--data.batch_size=2",
            "--trainer.max_steps=3",
            "--trainer.accelerator=cpu",
            "--trainer.log_every_n_steps=1",
            "--trainer.enable_model_summary=false",
            f"--run.name={fragment}",
        ]
        if METHODS[fragment][1] is SAMPLED:
            found.append("--model.sampling.max_new_tokens=8")
        if fragment == "reinvoke":
            found.append(f"--model.original.name={make_model_folder('original', seed=1)}")
        return [*found, *extra]

    return args


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fragment", METHODS)
def test_fragment_trains_logs_and_leaves_a_checkpoint_of_tensors_and_plain_values(
    fragment: str, run_cli: RunCli, fit_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    method, names, parts = METHODS[fragment]
    run_cli(*fit_of(fragment), "--model.optimizer=AdamW", "--model.optimizer.lr=0.01")
    run = tmp_path / "runs" / fragment
    trained = [line for line in records(run) if line["stage"] == "train"]
    assert [line["step"] for line in trained] == [1, 2, 3]
    # Of the last step, since what is logged after a step stands in the line of the next.
    last = {n.removeprefix("train/"): v for n, v in trained[-1].items() if n.startswith("train/")}
    assert set(last) == names
    assert all(math.isfinite(value) for value in last.values())
    assert last["loss"] > 0
    assert trained[-1]["perf/tokens_per_second"] > 0
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["sdft_lightning"]["method"] == method
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == parts


def test_cpt_runs_through_validation_with_its_questions(
    run_cli: RunCli, fit_of: Callable[..., list[str]], train_file: Path, tmp_path: Path
) -> None:
    questions = [f"--data.validation={train_file}", "--data.grader=contains"]
    run_cli(*fit_of("cpt", *questions), "--trainer.val_check_interval=3")
    validated = [line for line in records(tmp_path / "runs" / "cpt") if line["stage"] != "train"]
    assert any("val/task/task/accuracy" in line for line in validated)


def test_sft_then_export_then_reinvoke_leads_back_to_the_original(
    run_cli: RunCli,
    fit_of: Callable[..., list[str]],
    model_folder: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
) -> None:
    sft = [arg for arg in fit_of("dft") if "dft" not in arg]
    sft += [f"--config={FRAGMENTS / 'sft.yaml'}", f"--model.policy.name={model_folder}"]
    fast = ["--model.optimizer=AdamW", "--model.optimizer.lr=0.01"]
    run_cli(*sft, *fast, "--trainer.max_steps=10", "--run.name=sft")
    command = [arg for arg in sft if not arg.startswith("--trainer.max_steps")]
    run_cli("export", *command[1:], "--run.name=sft", "--ckpt_path=last")
    tuned = tmp_path / "runs" / "sft" / "exported" / "last"

    prompts = write_rows([{"prompt": f"Say {i}"} for i in range(8)], "prompts.jsonl")
    run_cli(
        "fit",
        f"--config={FRAGMENTS / 'reinvoke.yaml'}",
        f"--model.policy.name={tuned}",
        f"--model.original.name={model_folder}",
        "--model.sampling.max_new_tokens=8",
        *fast,
        f"--data.train={prompts}",
        "--data.batch_size=8",
        "--trainer.max_steps=20",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
        "--run.name=reinvoke",
    )
    losses = [line["train/loss"] for line in records(tmp_path / "runs" / "reinvoke")]
    assert len(losses) == 20
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


@pytest.mark.slow
def test_two_processes_write_each_row_once_and_save_all_of_them(
    fit_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    # 12 rows in global batches of 4; the second epoch deals the rows to other ranks.
    args = fit_of("offline", "--trainer.devices=2", "--trainer.strategy=ddp")
    counter = tmp_path / "counter.py"
    counter.write_text(COUNTER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, str(counter), *args, "--trainer.max_steps=6"],
        cwd=tmp_path,
        check=True,
        timeout=240,
        capture_output=True,
        env=environment,
    )
    lines = (tmp_path / "written.jsonl").read_text(encoding="utf-8").splitlines()
    written = [set(json.loads(line)) for line in lines]
    assert sum(len(rows) for rows in written) == 12
    assert len(set.union(*written)) == 12
    path = tmp_path / "runs" / "offline" / "checkpoints" / "last.ckpt"
    kept = torch.load(path, weights_only=True)["sdft_lightning_completions"]
    assert set(kept["row_ids"]) == set.union(*written)


# Notes the rows that each process has its teacher write for.
COUNTER = """
import json, sys, torch
torch.set_num_threads(1)
from sdft_lightning.cli import main
from sdft_lightning.modules import SDFTModule

sample = SDFTModule.sample_rollouts

def noted(self, batches, step):
    with open("written.jsonl", "a") as file:
        file.write(json.dumps([row.id for batch in batches for row in batch.rows]) + "\\n")
    return sample(self, batches, step)

SDFTModule.sample_rollouts = noted
main(sys.argv[1:])
"""
