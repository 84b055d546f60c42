"""A plan killed at every kind of moment and started again ends as the uninterrupted one."""

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
from safetensors.torch import load_file

Options = dict[str, Any]
Launcher = Callable[[list[str], list[Any] | None], int]

# Forks a process for each start of the plan, so that the imports are paid for once.
LAUNCHER = """
import json, os, sys, torch
torch.set_num_threads(1)
from sdft_lightning.cli import main
import killed
for line in sys.stdin:
    args, moment = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        if moment:
            killed.install(*moment)
        sys.argv = ["cli.py", *args]
        main()
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""

_END = "sdft_lightning.continual.stage_callbacks"
_DRIVE = "sdft_lightning.continual.drive"
# Each start runs into the next of these; together they go through a whole plan. `make soak` takes
# them all, `make test` those of SHORT.
MOMENTS = [
    # The base model's evaluation, and its record.
    ("sdft_lightning.callbacks:ItemScores.on_test_batch_end", "after", 2),
    (f"{_DRIVE}:append_record", "torn", 1),
    # A first fit: before any resume point, in a validation, right after one, before and in its
    # export, before it is said to be finished.
    (f"{_END}:ResumePoint._save", "before", 1),
    ("sdft_lightning.callbacks:DriftMonitor.on_validation_batch_end", "after", 2),
    ("sdft_lightning.callbacks:TokenBudget.on_train_batch_end", "before", 2),
    (f"{_END}:export_model", "before", 1),
    (f"{_END}:write_whole", "before", 1),
    # Its evaluation, its record, its checkpoints.
    (f"{_DRIVE}:measured", "before", 1),
    (f"{_DRIVE}:append_record", "after", 1),
    # A second stage: two steps in, and at its record.
    ("sdft_lightning.callbacks:TokenBudget.on_train_batch_end", "after", 3),
    (f"{_DRIVE}:append_record", "before", 1),
]
SHORT = [1, 4, 7, 9]


@pytest.fixture(scope="module")
def launch() -> Iterator[Launcher]:
    """Start a command line in a process of its own; answers with its wait status."""
    here = Path(__file__).resolve().parent
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert process.stdin is not None
    assert process.stdout is not None
    send, answers = process.stdin, process.stdout

    def run(args: list[str], moment: list[Any] | None = None) -> int:
        send.write(json.dumps([args, moment]) + "\n")
        send.flush()
        return int(answers.readline())

    yield run
    send.close()
    process.wait(timeout=30)


def results(folder: Path) -> list[Options]:
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def exported(folder: Path, run: str) -> dict[str, torch.Tensor]:
    fit = json.loads((folder / run / "fit.json").read_text())
    return load_file(folder / run / fit["exported"] / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_plan_killed_at_many_moments_ends_as_the_uninterrupted_one(
    launch: Launcher, plan_options: Options, tmp_path: Path
) -> None:
    plan_options |= {"select": "best", "seeds": [1]}
    # Right answers here and there, so that one step is better than another.
    for stage in plan_options["stages"]:
        path = Path(stage["data"]["train"])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        text = "".join(json.dumps({**row, "reference": list("aeiou")}) + "\n" for row in rows)
        graded = path.with_name(f"graded-{path.name}")
        graded.write_text(text)
        stage["data"] |= {"validation": str(graded), "test": str(graded)}
    config = tmp_path / "plan.yaml"
    config.write_text(json.dumps(plan_options))
    args = ["continual", f"--config={config}"]
    assert launch([*args, "--name=whole"]) == 0
    moments = MOMENTS if os.environ.get("SDFT_SOAK") else [MOMENTS[i] for i in SHORT]
    for place, when, count in moments:
        status = launch([*args, "--name=parts"], [place, when, count])
        assert os.WIFSIGNALED(status), (place, when, count)
        assert os.WTERMSIG(status) == 9
    assert launch([*args, "--name=parts"]) == 0

    whole, parts = (tmp_path / "runs" / name for name in ("whole", "parts"))
    assert results(parts) == results(whole)
    assert [record["status"] for record in results(whole)] == ["finished"] * 5
    runs = [record["run"] for record in results(whole)[1:]]
    for run in runs:
        one, other = exported(parts, run), exported(whole, run)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other), run
    assert [point["step"] for point in results(whole)[1]["curve"]] == [2, 4]
    base, first = exported(whole, runs[0]), exported(whole, runs[1])
    assert any(not torch.equal(base[name], first[name]) for name in base)
    left = [path for path in parts.rglob("*.ckpt")]
    assert left == []


@pytest.mark.slow
def test_failed_chain_is_recorded_and_the_exit_code_tells(
    launch: Launcher, plan_options: Options, tmp_path: Path
) -> None:
    plan_options |= {"seeds": [1], "stages": plan_options["stages"][:1], "budget": {"updates": 1}}
    plan_options["methods"]["sdft"]["data"] = {"batch_size": 500}  # more than there are rows
    config = tmp_path / "plan.yaml"
    config.write_text(json.dumps(plan_options))
    status = launch(["continual", f"--config={config}"])
    assert os.waitstatus_to_exitcode(status) == 1
    base, sdft, sft = results(tmp_path / "runs" / "plan")
    assert sdft["status"] == "failed"
    assert "data.batch_size: 500" in sdft["error"]
    assert (base["status"], sft["status"]) == ("finished", "finished")
    assert sft["tokens"] > 0
    assert set(sft["tasks"]["ferry"]["items"]) == {f"ferry-row-{i}" for i in range(12)}
