"""`make demo`: teach the embedded model facts by SDFT and by SFT, and compare what was kept."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_lightning.cli import main as run_command
from sdft_lightning.data.sources import presets_folder
from sdft_lightning.errors import print_anything
from sdft_lightning.files.run_folder import unused_path

TASK = "front_desk"
GENERAL = "general"


class Point(NamedTuple):
    """What one checkpoint can do.

    Attributes:
        step: Optimizer steps.
        new: Accuracy on unseen wordings of the facts.
        general: Accuracy on general questions.
        drift: KL from the base model on general questions, in nats a token.
    """

    step: int
    new: float
    general: float
    drift: float


class DemoResult(NamedTuple):
    """What the demo measured.

    Attributes:
        base: The model before training.
        teacher: Accuracy of the teacher, which sees source text and answer.
        sdft: SDFT's checkpoints in order; the last is the result.
        sft: SFT's checkpoints in order.
    """

    base: Point
    teacher: float
    sdft: list[Point]
    sft: list[Point]

    @property
    def matched_sft(self) -> Point:
        """The SFT checkpoint whose new ability is nearest to SDFT's; the earlier of two."""
        return min(self.sft, key=lambda point: abs(point.new - self.sdft[-1].new))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def points_of(records: list[dict[str, Any]]) -> list[Point]:
    """The validations among the records of a fit."""
    return [
        Point(
            record["step"],
            record[f"val/task/{TASK}/accuracy"],
            record[f"val/task/{GENERAL}/accuracy"],
            record[f"val/drift/{GENERAL}"],
        )
        for record in records
        if record["stage"] == "validation"
    ]


def read_result(root: Path) -> DemoResult:
    """Collect the figures of the three runs below a folder."""
    record = read_records(root / "base" / "test-0" / "metrics.jsonl")[-1]
    base = Point(
        0, record[f"test/task/{TASK}/accuracy"], record[f"test/task/{GENERAL}/accuracy"], 0.0
    )
    return DemoResult(
        base,
        record[f"test/task/{TASK}/teacher_accuracy"],
        points_of(read_records(root / "sdft" / "metrics.jsonl")),
        points_of(read_records(root / "sft" / "metrics.jsonl")),
    )


def table(result: DemoResult) -> str:
    """The comparison as a Markdown table, and what of it holds."""
    sdft, matched, last = result.sdft[-1], result.matched_sft, result.sft[-1]
    rows = [
        ("base", result.base),
        (f"**SDFT**, {sdft.step} steps", sdft),
        (f"SFT, {matched.step} steps (nearest new ability)", matched),
        (f"SFT, {last.step} steps", last),
    ]
    lines = [
        "| | new ability | general ability | KL from base |",
        "|---|---|---|---|",
        *(
            f"| {name} | {p.new:.0%} | {p.general:.0%} | {p.drift:.2f} nats |"
            for name, p in rows[: 3 if matched == last else 4]
        ),
        f"| teacher, with source text and answer | {result.teacher:.0%} | | |",
    ]
    return "\n".join([*lines, "", *findings(result)])


def findings(result: DemoResult) -> list[str]:
    """What the demo is meant to show, each line with whether it did."""
    base, sdft, sft = result.base, result.sdft[-1], result.matched_sft
    claims = [
        (sdft.new >= base.new + 0.5, "SDFT's new ability is at least 50 points above base"),
        (sdft.new >= 0.8 * result.teacher, "SDFT reaches at least 80 % of its teacher"),
        (sdft.drift <= sft.drift / 3, "its KL from base is at most a third of matched SFT's"),
        (sdft.general >= base.general - 0.05, "its general ability is at most 5 points under base"),
        (sdft.general >= sft.general, "its general ability is not below matched SFT's"),
    ]
    return [f"- {'shown' if holds else 'NOT shown'}: {text}" for holds, text in claims]


def draw(result: DemoResult, path: Path) -> None:
    """Plot learning curves, and new ability against what was kept.

    Args:
        result: The figures.
        path: Where the PNG goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for name, points, colour in (
        ("SDFT", result.sdft, "tab:blue"),
        ("SFT", result.sft, "tab:orange"),
    ):
        curve = [result.base, *points]
        steps = [p.step for p in curve]
        new = [100 * p.new for p in curve]
        axes[0].plot(steps, new, "o-", color=colour, label=name)
        axes[1].plot([p.drift for p in curve], new, "o-", color=colour, label=name)
        axes[2].plot(steps, [100 * p.general for p in curve], "o-", color=colour, label=name)
    axes[0].axhline(100 * result.teacher, color="grey", linestyle=":", label="teacher")
    axes[2].axhline(100 * result.base.general, color="grey", linestyle=":", label="base")
    axes[0].set(title="new ability, unseen wording", xlabel="optimizer steps", ylabel="% right")
    axes[1].set(
        title="new ability against drift", xlabel="KL from base, nats a token", ylabel="% right"
    )
    axes[2].set(title="general questions", xlabel="optimizer steps", ylabel="% right")
    for each in axes:
        each.set_ylim(-3, 103)
        each.grid(alpha=0.3)
        each.legend()
    figure.savefig(path, dpi=110)


def run_demo(
    configs: Path, root: Path, seed: int, command: Callable[[list[str]], None] = run_command
) -> DemoResult:
    """Measure the base model, train both methods, and write table and plot.

    Args:
        configs: Folder with demo_sdft.yaml and demo_sft.yaml.
        root: Folder of the three runs; must not exist.
        seed: Seed of both runs.
        command: Runs a command line.

    Returns:
        What was measured.
    """
    common = [f"--run.root={root}", f"--seed_everything={seed}"]
    for title, name, config, verb in (
        ("the model before training, and its teacher", "base", "demo_sdft", "test"),
        ("SDFT", "sdft", "demo_sdft", "fit"),
        ("SFT", "sft", "demo_sft", "fit"),
    ):
        print(f"\n=== {title} ({time.strftime('%H:%M:%S')})", flush=True)
        command([verb, f"--config={configs / f'{config}.yaml'}", f"--run.name={name}", *common])
        gc.collect()
    result = read_result(root)
    (root / "table.md").write_text(table(result) + "\n", encoding="utf-8")
    draw(result, root / "demo.png")
    return result


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
    options = parser.parse_args(args)
    root = unused_path(options.root)
    print(
        f"Teaching sixteen facts to a 135M model on this CPU, by SDFT and by SFT, into {root}. "
        "16 to 24 minutes on two cores."
    )
    start = time.monotonic()
    result = run_demo(options.configs, root, options.seed)
    print(f"\n{table(result)}\n")
    print(f"Plot: {root / 'demo.png'}   TensorBoard: .venv/bin/tensorboard --logdir {root}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes, seed {options.seed}")


if __name__ == "__main__":
    main()
