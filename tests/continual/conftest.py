"""A small plan, and a stand-in for the runs' command that writes what runs leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.checks import canonical_plan, claim_folder, plan_hash
from sdft_lightning.continual.drive import RunFailed, Work, work_through
from sdft_lightning.continual.plan import ContinualPlan, Shard, plan_folder
from sdft_lightning.continual.plan_file import build_plan
from sdft_lightning.continual.records import all_records

Options = dict[str, Any]


@pytest.fixture
def plan_options(
    model_folder: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
) -> Options:
    """Two methods, two stages, two seeds, on the tiny model; four updates of two rows."""
    files = {}
    for name in ("ferry", "museum"):
        rows = [
            {**row, "prompt": f"{name} {row['prompt']}", "id": f"{name}-{row['id']}"}
            for row in make_rows(12)
        ]
        files[name] = str(write_rows(rows, f"{name}.jsonl"))
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    model = {
        "policy": {"name": str(model_folder)},
        "evaluation": {"max_new_tokens": 8},
        "optimizer": optimizer,
    }
    sampling = {"max_new_tokens": 8}
    return {
        "name": "plan",
        "root": str(tmp_path / "runs"),
        "seeds": [1, 2],
        "processes": "same",
        "model": {"init_args": model},
        "data": {
            "grader": "contains",
            "columns": {"reference": "reference", "id": "id"},
            "prompts": {"style": "turns"},
            "batch_size": 2,
            "eval_batch_size": 4,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
        },
        "methods": {
            "sdft": {"model": {"class_path": "SDFTModule", "init_args": {"sampling": sampling}}},
            "sft": {"model": {"class_path": "SFTModule"}, "data": {"batch_size": 3}},
        },
        "stages": [
            {"name": name, "data": dict.fromkeys(("train", "validation", "test"), files[name])}
            for name in files
        ],
        "held_out": {"general": {"source": files["ferry"], "grader": "contains"}},
        "drift": ["general"],
        "budget": {"updates": 4},
        "resume_every": 1,
    }


class FakeRuns:
    """Takes the place of the command: instead of training it writes down what a run would.

    Attributes:
        calls: Each command with its arguments but the config, and the options in the config.
        fail: Says of a command and its options whether it fails.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str], Options]] = []
        self.fail: Callable[[str, Options], bool] = lambda command, options: False

    def __call__(self, args: list[str]) -> None:
        command, config, *rest = args
        options = json.loads(Path(config.removeprefix("--config=")).read_text())
        self.calls.append((command, rest, options))
        if self.fail(command, options):
            raise RunFailed("it was meant to")
        folder = Path(options["run"]["root"]) / options["run"]["name"]
        (self._fit if command == "fit" else self._test)(folder, options)

    def _fit(self, folder: Path, options: Options) -> None:
        (folder / "exported" / "step-4").mkdir(parents=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").write_text("large")
        (folder / "mine.txt").write_text("kept")
        line = {"stage": "validation", "step": 4, "val/task/general/accuracy": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        found = {"updates": 4, "tokens": 40, "selected_step": 4, "seconds": 2.0}
        (folder / "fit.json").write_text(json.dumps({**found, "exported": "exported/step-4"}))

    def _test(self, folder: Path, options: Options) -> None:
        number = len(list(folder.glob("test-*")))
        new = folder / f"test-{number}"
        new.mkdir(parents=True)
        # A score that tells the model by its folder's name.
        score = len(str(options["model"]["init_args"]["policy"]["name"])) / 1000
        metrics, items = {}, []
        for name in options["data"]["held_out"]:
            metrics[f"test/task/{name}/accuracy"] = score
            metrics |= {f"test/task/{name}/accuracy_{end}": score for end in ("low", "high")}
            items.append({"task": name, "id": "row", "score": score, "completion": "x"})
        line = {"stage": "test", "step": 0, **metrics, "test/drift/general": score}
        (new / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (new / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture
def fake_runs() -> FakeRuns:
    """The stand-in."""
    return FakeRuns()


class Driver:
    """Works through plans with the stand-in."""

    def __init__(self, runs: FakeRuns) -> None:
        self.runs = runs

    def __call__(self, options: Options, shard: Shard = Shard()) -> int:  # noqa: B008 - frozen
        plan = build_plan(options)
        canonical = canonical_plan(plan)
        claim_folder(plan_folder(plan), canonical)
        return work_through(Work(plan, plan_hash(canonical), shard, lambda locks: self.runs))

    def records(self, options: Options) -> dict[Any, Options]:
        plan = build_plan(options)
        return all_records(plan_folder(plan), plan_hash(canonical_plan(plan)))


@pytest.fixture
def drive(fake_runs: FakeRuns) -> Driver:
    """Work through a plan with the stand-in."""
    return Driver(fake_runs)


@pytest.fixture
def plan(plan_options: Options) -> ContinualPlan:
    """The small plan."""
    return build_plan(plan_options)
