"""A wheel is a whole product: in an empty environment and an empty folder, without a clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)  # a build, an environment, five starts of Python

ROOT = Path(__file__).parents[1]
# What a wheel is built from.
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")

# Commands of a user, in one process, as each of their own would import torch anew.
COMMANDS = """
import sys
from pathlib import Path

import sdft_lightning
from sdft_lightning.cli import main
from sdft_lightning.cli.demo import run_demo
from sdft_lightning.data.sources import presets_folder

model = sys.argv.pop()
assert Path(sdft_lightning.__file__).is_relative_to(sys.prefix), sdft_lightning.__file__
small = [
    f"--model.policy.name={model}",
    "--model.evaluation.max_new_tokens=3",
    "--data.lengths.teacher_prompt=4096",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_model_summary=false",
]
fit = ["--data.batch_size=2", "--trainer.max_steps=1", "--model.sampling.max_new_tokens=4"]
main(["fit", "--config=preset:quickstart", *small, *fit])
main(["validate", "--config", "preset:quickstart", *small])
main(["report", "results.jsonl"])


class FirstStep(Exception):
    pass


def command(words):
    # Benchmarks want all of their batches.
    demo = [each for each in small if "limit_test" not in each]
    main([*words, *demo, "--data.eval_batch_size=64", "--data.benchmarks.limit=1"])
    raise FirstStep


try:
    run_demo(presets_folder(), Path("runs/demo"), 42, ("base", "sdft_retain"), command)
except FirstStep:
    print("first step of the demo is done")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built in a copy of it."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copyfile(ROOT / name, copy / name)
    for name in ("sdft_lightning", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    run([sys.executable, "-c", build, "dist"], copy)
    (found,) = (copy / "dist").glob("*.whl")
    return found


def run(command: list[str], folder: Path) -> str:
    """Run a program in a folder; what it prints."""
    inherited = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=inherited, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which the wheel is all that is installed; dependencies are those of ours.

    A folder that a .pth file adds is searched for packages, but its own .pth files are not read:
    the editable install of this checkout is not seen.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], wheel.parent)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run([*pip, "--quiet", "--ignore-installed", str(wheel)], wheel.parent)
    return folder


def test_wheel_holds_the_configs_of_the_repository_and_nothing_of_a_clone_besides(
    wheel: Path,
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    package = {name for name in files if name.startswith("sdft_lightning/")}
    assert {name.partition("/")[0] for name in files.keys() - package} == {
        f"sdft_lightning-{wheel.name.split('-')[1]}.dist-info"
    }
    packed = {name.removeprefix("sdft_lightning/"): files[name] for name in package}
    ours = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert {name: text for name, text in packed.items() if name.startswith("configs/")} == ours
    assert len(ours) > 30
    for name in ("py.typed", "continual/report/page.css", "data/examples/ferry/train.jsonl"):
        assert name in packed
    modules = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "sdft_lightning").rglob("*.py")
    }
    assert {name for name in package if name.endswith(".py")} == modules


def record(method: str, seed: int | None, stage: int) -> dict[str, Any]:
    """A line of a results file as `continual` writes it, of invented scores."""
    items = {"a": 1.0, "b": float(stage)}
    accuracy = sum(items.values()) / 2
    return {
        "format": 1,
        "status": "finished",
        "error": None,
        "plan": "5eed" * 16,
        "method": method,
        "seed": seed,
        "stage": stage,
        "stage_name": "desk" if stage else None,
        "stages": ["desk"],
        "run": f"{method}/{stage}",
        "updates": stage,
        "tokens": stage,
        "selected_step": stage or None,
        "seconds": {"fit": 0.0, "evaluate": 1.0},
        "tasks": {"desk": {"accuracy": accuracy, "low": 0.1, "high": 1.0, "n": 2, "items": items}},
        "capabilities": {},
        "drift": {},
        "curve": [],
    }


@pytest.mark.slow
def test_wheel_fits_validates_reports_and_begins_the_demo_in_an_empty_folder(
    environment: Path,
    tmp_path: Path,
    make_model_folder: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
) -> None:
    model = make_model_folder(max_position_embeddings=4096)
    empty = tmp_path / "empty"
    empty.mkdir()
    sdft = str(environment / "bin" / "sdft")
    assert run([sdft, "--version"], empty).startswith("sdft ")
    assert "\n    demo " in run([sdft, "--help"], empty)
    records = [record("base", None, 0), record("sdft", 42, 1)]
    lines = "".join(json.dumps(each) + "\n" for each in records)
    (empty / "results.jsonl").write_text(lines, encoding="utf-8")
    printed = run([str(environment / "bin" / "python"), "-c", COMMANDS, str(model)], empty)
    assert "first step of the demo is done" in printed
    for name in (
        "runs/quickstart/config.yaml",
        "runs/quickstart/exported/final/model.safetensors",
        "runs/quickstart/validate-0/metrics.jsonl",
        "report/index.html",
        "runs/demo/base/test-0/metrics.jsonl",
    ):
        assert (empty / name).is_file(), name
