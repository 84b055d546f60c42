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
from sdft_lightning.errors import UserError, print_anything
from sdft_lightning.files.run_folder import ITEM_SCORES, ItemKey, read_items, unused_path
from sdft_lightning.files.whole_files import read_records, write_whole
from sdft_lightning.graders import Paired, paired_test, wilson_interval
from sdft_lightning.types import Items

TASK = "front_desk"
BASE = "base"
STORED = Path(__file__).parents[1] / "data" / "examples" / "demo" / "runs.json"

# Which items each measure is of; general questions are two sets.
_SETS: dict[str, list[ItemKey]] = {
    "new": [ItemKey("task", TASK, "accuracy")],
    "instructions": [ItemKey("capability", "kept_instructions", "prompt_level_loose_acc")],
    "general": [ItemKey("task", "general", "accuracy"), ItemKey("task", "kept", "accuracy")],
    "text": [ItemKey("capability", "kept_text", "word_perplexity")],
}


class Method(NamedTuple):
    """One of the methods that are compared."""

    title: str
    config: str  # file in the folder of configs, without `.yaml`
    retains: bool  # whether it is given rows to retain
    nearest: bool  # whether the checkpoint of nearest new ability is shown, and not the last
    colour: str


METHODS = {
    "sft": Method("SFT", "demo_sft", False, True, "tab:orange"),
    "sft_retain": Method("SFT with rows to retain", "demo_sft", True, True, "tab:red"),
    "sdft": Method("SDFT", "demo_sdft", False, False, "tab:cyan"),
    "sdft_retain": Method("SDFT with rows to retain", "demo_sdft", True, False, "tab:blue"),
}
MAIN = "sdft_retain"
# Those that the demo itself trains; of the others stored runs are shown.
TRAINED = ("sdft", "sdft_retain")


class Share(NamedTuple):
    """A share of right items with its 95 % Wilson interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """The share with its interval, as in the table."""
        return f"{self.value:.0%} ({self.low:.0%} to {self.high:.0%})".replace("%", " %")


class Point(NamedTuple):
    """A validation while a method trains."""

    step: int
    new: float  # accuracy on unseen wordings of the facts
    drift: float  # KL from the base model on general questions, nats a token


class Measured(NamedTuple):
    """What one model can do.

    Attributes:
        step: Optimizer steps.
        drift: KL from the base model on general questions, in nats a token.
        perplexity: Of a word of the shipped texts.
        items: Scores of single items: `new`, `instructions`, `general`, `text` (log-likelihoods).
    """

    step: int
    drift: float
    perplexity: float
    items: dict[str, dict[str, float]]

    def share(self, name: str) -> Share:
        """The share of right items of a measure."""
        scores = self.items[name]
        right = sum(scores.values())
        return Share(right / len(scores), *wilson_interval(right, len(scores)))

    def against(self, base: Measured, name: str) -> Paired:
        """How the items of a measure compare with the base model's."""
        found = paired_test(Items(base.items[name], ""), Items(self.items[name], ""))
        assert found is not None
        return found


class Run(NamedTuple):
    """What training with a method came to."""

    curve: list[Point]
    measured: Measured  # the last model, or the checkpoint of nearest new ability
    seconds: float  # of an optimizer step, the median


class DemoResult(NamedTuple):
    """What the demo measured.

    Attributes:
        base: The model before training.
        teacher: Accuracy of the teacher, which sees source text and answer.
        runs: By the name of the method, those that there are.
        stored: What was read from stored runs: names of methods, `base`.
        seed: Of these runs.
    """

    base: Measured
    teacher: float
    runs: dict[str, Run]
    stored: list[str]
    seed: int

    @property
    def main(self) -> Measured:
        """The model that the demo is about: SDFT with rows to retain."""
        return self.runs[MAIN].measured


# --- reading what the runs have written ----------------------------------------------------------


def read_measured(folder: Path, step: int) -> Measured:
    """What a `test` of the demo measured.

    Args:
        folder: Its folder.
        step: Optimizer steps of the model.
    """
    record = read_records(folder / "metrics.jsonl")[-1]
    lines = {each.key: each.items.scores for each in read_items(folder / ITEM_SCORES, "demo")}
    items = {
        name: {f"{key.task}/{row}": score for key in keys for row, score in lines[key].items()}
        for name, keys in _SETS.items()
    }
    drift = float(record["test/drift/general"])
    return Measured(step, drift, float(record["test/capability/kept_text/word_perplexity"]), items)


def read_curve(folder: Path) -> tuple[list[Point], int, float]:
    """The validations of a fit, its last step, and the median seconds of its steps."""
    records = read_records(folder / "metrics.jsonl")
    points = [
        Point(record["step"], record[f"val/task/{TASK}/accuracy"], record["val/drift/general"])
        for record in records
        if record["stage"] == "validation"
    ]
    timed = [record for record in records if "perf/step_seconds" in record]
    seconds = sorted(record["perf/step_seconds"] for record in timed)
    return points, timed[-1]["step"], seconds[len(seconds) // 2]


class Stored(NamedTuple):
    """What a file of stored runs holds."""

    base: tuple[Measured, float] | None  # the model before training, its teacher's accuracy
    runs: dict[int, dict[str, Run]]  # by seed, then by the name of the method


def load_stored(path: Path) -> Stored:
    """Read a file of stored runs; empty where there is no file."""
    if not path.is_file():
        return Stored(None, {})
    held = json.loads(path.read_text(encoding="utf-8"))
    base = held["base"] and (Measured(*held["base"][0]), float(held["base"][1]))
    runs = {
        int(seed): {
            name: Run([Point(*point) for point in curve], Measured(*measured), seconds)
            for name, (curve, measured, seconds) in of_seed.items()
        }
        for seed, of_seed in held["seeds"].items()
    }
    return Stored(base, runs)


def store(path: Path, seed: int, result: DemoResult) -> None:
    """Add what was measured now to a file of stored runs."""
    held = load_stored(path)
    base = held.base if BASE in result.stored else (result.base, result.teacher)
    now = {name: run for name, run in result.runs.items() if name not in result.stored}
    seeds = held.runs | {seed: held.runs.get(seed, {}) | now}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"base": base, "seeds": dict(sorted(seeds.items()))}) + "\n")


# --- what is shown -------------------------------------------------------------------------------


def table(result: DemoResult) -> str:
    """The comparison as a Markdown table, and what of it holds."""
    base = result.base
    lines = [
        "| | new ability | instructions followed | general questions | perplexity | KL from base |",
        "|---|---|---|---|---|---|",
        _row("base", base, base),
    ]
    for name in ("sft", "sft_retain", "sdft", "sdft_retain"):
        if name in result.runs:
            shown = result.runs[name].measured
            title = f"{METHODS[name].title}, {shown.step} steps"
            lines.append(_row(f"**{title}**" if name == MAIN else title, shown, base))
    lines.append(f"| teacher, with source text and answer | {100 * result.teacher:.0f} % | | | | |")
    stored = ", ".join(METHODS[name].title if name in METHODS else name for name in result.stored)
    told = [
        "In brackets 95 % intervals; ▼ and ▲: worse and better than base, item by item, p at most",
        "0.05. SFT's checkpoints are those of nearest new ability.",
    ]
    if stored:
        told.append(f"From stored runs of seed {result.seed}, not measured now: {stored}.")
    return "\n".join([*lines, "", *told, "", *findings(result)])


def _row(title: str, shown: Measured, base: Measured) -> str:
    cells = [f"{shown.share(name)}{mark(shown, base, name)}" for name in _SHARES]
    text = f"{shown.perplexity:.1f}{mark(shown, base, 'text')}"
    return f"| {title} | {' | '.join(cells)} | {text} | {shown.drift:.2f} nats |"


_SHARES = ("new", "instructions", "general")


def mark(shown: Measured, base: Measured, name: str) -> str:
    """How a measure compares with base: worse, better, or nothing that could be told from noise."""
    if shown is base:
        return ""
    test = shown.against(base, name)
    if test.p > 0.05 or test.lost == test.gained:
        return ""
    return " ▼" if _is_worse(shown, base, name) else " ▲"


def _is_worse(shown: Measured, base: Measured, name: str) -> bool:
    if name == "text":
        return shown.perplexity > base.perplexity
    return shown.share(name).value < base.share(name).value


def is_kept(shown: Measured, base: Measured, name: str) -> bool:
    """Whether a measure is not worse than base by 2 points (2 %) or more with p at most 0.05."""
    if name == "text":
        least = shown.perplexity < 1.02 * base.perplexity
    else:
        least = shown.share(name).value > base.share(name).value - 0.02
    worse = _is_worse(shown, base, name)
    return least or not worse or shown.against(base, name).p > 0.05


def findings(result: DemoResult) -> list[str]:
    """What the demo is meant to show, each line with whether it did."""
    base, main = result.base, result.main
    new = main.share("new").value
    claims = [
        (new >= base.share("new").value + 0.55, "new ability at least 55 points above base"),
        (new >= 0.8 * result.teacher, "at least 80 % of the teacher's"),
        (main.drift <= 0.15, "KL from base at most 0.15 nats"),
        *((is_kept(main, base, name), f"{words} kept") for name, words in _KEPT.items()),
    ]
    told = [(holds, f"SDFT with rows to retain: {text}") for holds, text in claims]
    if "sft" in result.runs:
        sft = result.runs["sft"].measured
        lost = [words for name, words in _KEPT.items() if not is_kept(sft, base, name)]
        lost += ["KL from base (three times SDFT's)"] if sft.drift > 3 * main.drift else []
        text = "SFT at the nearest new ability has lost at least two of these"
        told.append((len(lost) >= 2, f"{text}: {', '.join(lost) or 'none'}"))
    return [f"- {'shown' if holds else 'NOT shown'}: {text}" for holds, text in told]


_KEPT = {
    "instructions": "instructions followed",
    "general": "general questions",
    "text": "perplexity",
}


def draw(result: DemoResult, path: Path) -> None:
    """Plot new ability to the right and what was kept upward, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, run in result.runs.items():
        method = METHODS[name]
        path_x = [100 * result.base.share("new").value, *(100 * p.new for p in run.curve)]
        left.plot(path_x, [0.0, *(p.drift for p in run.curve)], "o-", color=method.colour, ms=4)
        last = run.curve[-1]
        left.annotate(
            method.title, (100 * last.new, last.drift), xytext=(0, 6), color=method.colour,
            ha="right", textcoords="offset points", fontsize=9,
        )  # fmt: skip
        _mark_share(right, run.measured, method)
    base = result.base.share("instructions")
    right.axhspan(100 * base.low, 100 * base.high, color="0.92", zorder=0)
    right.axhline(100 * base.value, color="grey", linestyle=":", zorder=0)
    for axes in (left, right):
        axes.axvline(100 * result.teacher, color="grey", linestyle="--", linewidth=1)
        axes.set(xlim=(-4, 104), xlabel="new ability: % right, unseen wording →")
        axes.grid(alpha=0.3)
    left.annotate("teacher", (100 * result.teacher + 1, 0), color="grey", fontsize=9)
    left.invert_yaxis()
    left.set(ylabel="← further from base (KL, nats a token)", title="How far the model has moved")
    right.set(ylabel="instructions followed, % →", title="What it still does as before")
    right.text(0, 100 * base.value, "base", color="grey", fontsize=9, va="bottom")
    right.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


def _mark_share(axes: Any, each: Measured, method: Method) -> None:
    """One model of the right-hand picture, with its interval."""
    new, kept = each.share("new"), each.share("instructions")
    bars = [[100 * (kept.value - kept.low)], [100 * (kept.high - kept.value)]]
    axes.errorbar(
        [100 * new.value], [100 * kept.value], yerr=bars, fmt="o", capsize=3,
        color=method.colour, ms=8, label=f"{method.title}, {each.step} steps",
    )  # fmt: skip


# --- the course ----------------------------------------------------------------------------------


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
    near = seed if seed in held.runs else next(iter(held.runs), seed)
    others = {name: run for name, run in held.runs.get(near, {}).items() if name not in train}
    for name in (MAIN, *(name for name in METHODS if name != MAIN)):
        if name in train:
            new = (trained | others)[MAIN].measured.share("new").value if name != MAIN else None
            trained[name] = course.train(name, new)
    runs = {name: (trained | others)[name] for name in METHODS if name in trained | others}
    named = [*([] if (root / BASE).exists() else [BASE]), *(n for n in runs if n not in trained)]
    result = DemoResult(*held.base, runs, named, near)
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


def main() -> None:
    """Run the demo and print its table."""
    print_anything()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--configs", type=Path, default=Path("configs"))
    parser.add_argument("--root", type=Path, default=Path("runs/demo"))
    text = f"what to measure now, of {', '.join([BASE, *METHODS])}; the rest is read from a file"
    parser.add_argument("--train", default=",".join(TRAINED), help=text)
    parser.add_argument("--store", type=Path, help="add what is measured now to this file")
    options = parser.parse_args()
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
        "About 20 minutes on two cores for two methods."
    )
    start = time.monotonic()
    result = run_demo(options.configs, root, options.seed, train)
    if options.store is not None:
        store(options.store, options.seed, result)
    print(f"\n{table(result)}\n")
    print(f"Plot: {root / 'demo.png'}   TensorBoard: .venv/bin/tensorboard --logdir {root}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes, seed {options.seed}")


if __name__ == "__main__":
    main()
