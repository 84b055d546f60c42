"""`make demo`: teach the embedded model facts by SDFT and by SFT, and compare what was kept."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sdft_lightning.cli import main as run_command
from sdft_lightning.cli.demo_result import (
    BASE,
    MAIN,
    METHODS,
    TASK,
    DemoResult,
    Measured,
    Point,
    Run,
    draw,
    load_stored,
    nearest_runs,
    read_curve,
    read_measured,
    store,
    table,
)
from sdft_lightning.data.sources import presets_folder
from sdft_lightning.errors import UserError, print_anything
from sdft_lightning.files.run_folder import unused_path
from sdft_lightning.files.whole_files import read_records

STORED = Path(__file__).parents[1] / "data" / "examples" / "demo" / "runs.json"
# Those that the demo itself trains; of the others stored runs are shown.
TRAINED = (MAIN,)


def run_demo(
    configs: Path,
    root: Path,
    seed: int,
    train: Sequence[str] = TRAINED,
    command: Callable[[list[str]], None] = run_command,
    stored: Path = STORED,
) -> DemoResult:
    """Measure the base model, train the methods, measure them, and write table and plot.

    Args:
        configs: Folder with the demo's configs.
        root: Folder of the runs; must not exist.
        seed: Seed of all runs.
        train: Names of the methods to train; of the others stored runs are read.
        command: Runs a command line.
        stored: File of stored runs.
    """
    root.mkdir(parents=True)
    course, held = _Course(configs, root, seed, command), load_stored(stored)
    if held.base is None or BASE in train:
        base = course.measure(BASE, "demo_sdft", 0, "the model before training, and its teacher")
        record = read_records(root / BASE / "test-0" / "metrics.jsonl")[-1]
        held = held._replace(base=(base, float(record[f"test/task/{TASK}/teacher_accuracy"])))
    assert held.base is not None
    trained: dict[str, Run] = {}
    near = {name: each for name, each in nearest_runs(held, seed).items() if name not in train}
    others = {name: run for name, (_, run) in near.items()}
    for name in (MAIN, *(name for name in METHODS if name != MAIN)):
        if name in train:
            new = (trained | others)[MAIN].measured.share("new").value if name != MAIN else None
            trained[name] = course.train(name, new)
    runs = {name: (trained | others)[name] for name in METHODS if name in trained | others}
    base_of: dict[str, int | None] = {} if (root / BASE).exists() else {BASE: None}
    named = base_of | {name: near[name][0] for name in runs if name in near}
    result = DemoResult(*held.base, runs, named)
    (root / "table.md").write_text(table(result) + "\n", encoding="utf-8")
    draw(result, root / "demo.png")
    return result


class _Course(NamedTuple):
    """The demo's command lines, one after the other."""

    configs: Path
    root: Path
    seed: int
    command: Callable[[list[str]], None]

    def run(self, title: str, verb: str, name: str, files: list[str], options: list[str]) -> None:
        """Say what comes, and run it."""
        print(f"\n=== {title} ({time.strftime('%H:%M:%S')})", flush=True)
        configs = [f"--config={self.configs / f'{file}.yaml'}" for file in files]
        common = [f"--run.name={name}", f"--run.root={self.root}", f"--seed_everything={self.seed}"]
        self.command([verb, *configs, *common, *options])
        gc.collect()

    def measure(self, name: str, config: str, step: int, title: str, *options: str) -> Measured:
        """Measure a model in a run of its own."""
        self.run(title, "test", name, [config, "data/demo_measures"], list(options))
        return read_measured(self.root / name / "test-0", step)

    def train(self, name: str, new: float | None) -> Run:
        """Train a method and measure its last model, or the checkpoint nearest to a new ability."""
        method, folder = METHODS[name], self.root / name
        files = [method.config, *(["data/demo_retain"] if method.retains else [])]
        options = [f"--checkpoint.save_top_k={-1 if method.nearest else 0}"]
        if method.retains and method.config == "demo_sft":
            options.append("--model.initial_copy=true")
        self.run(method.title, "fit", name, files, options)
        curve, step, seconds = read_curve(folder)
        model = f"--model.policy.name={folder / 'exported' / 'final'}"
        if method.nearest and new is not None:
            step = min(curve, key=lambda point: abs(point.new - new)).step
            model = f"--ckpt_path={folder / 'checkpoints' / f'step-{step}.ckpt'}"
        title = f"{method.title}: what step {step} has kept"
        measured = self.measure(f"{name}_{step}", "demo_sft", step, title, model)
        if step > curve[-1].step:
            curve = [*curve, Point(step, measured.share("new").value, measured.drift)]
        return Run(curve, measured, seconds)


def main(args: Sequence[str] | None = None) -> None:
    """Run the demo and print its table.

    Args:
        args: Its options; those of the process without it.
    """
    print_anything()
    parser = argparse.ArgumentParser(prog="sdft demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--configs", type=Path, default=presets_folder())
    parser.add_argument("--root", type=Path, default=Path("runs/demo"))
    text = f"what to measure now, of {', '.join([BASE, *METHODS])}; the rest is read from a file"
    parser.add_argument("--train", default=",".join(TRAINED), help=text)
    parser.add_argument("--store", type=Path, help="add what is measured now to this file")
    options = parser.parse_args(args)
    train = options.train.split(",")
    allowed = [BASE, *METHODS]
    unknown = [name for name in train if name not in allowed]
    if unknown or not (MAIN in train or MAIN in load_stored(STORED).runs.get(options.seed, {})):
        raise UserError(
            f"--train: got {options.train}, allowed are {', '.join(allowed)}, separated by commas; "
            f"{MAIN} among them, unless a run of seed {options.seed} is stored."
        )
    root = unused_path(options.root)
    print(
        f"Teaching sixteen facts to a 135M model on this CPU into {root}: {', '.join(train)}. "
        "About 20 minutes on two cores for SDFT with rows to retain."
    )
    start = time.monotonic()
    result = run_demo(options.configs, root, options.seed, train)
    if options.store is not None:
        store(options.store, options.seed, result)
    print(f"\n{table(result)}\n")
    print(f"Plot: {root / 'demo.png'}   TensorBoard: tensorboard --logdir {root}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes, seed {options.seed}")


if __name__ == "__main__":
    main()
