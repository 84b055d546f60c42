"""What the demo came to: the records of its runs, the table, the picture, and what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from sdft_lightning.files.run_folder import ITEM_SCORES, ItemKey, read_items
from sdft_lightning.files.whole_files import read_records, write_whole
from sdft_lightning.graders import Paired, paired_test, wilson_interval
from sdft_lightning.types import Items

TASK = "front_desk"
BASE = "base"

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
        stored: What was read from stored runs, with the seed of each: names of methods, `base`.
    """

    base: Measured
    teacher: float
    runs: dict[str, Run]
    stored: dict[str, int | None]

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


def nearest_runs(stored: Stored, seed: int) -> dict[str, tuple[int, Run]]:
    """Of each method the run of a seed, or of the first one that has it, with its seed."""
    seeds = [seed, *(each for each in stored.runs if each != seed)]
    found: dict[str, tuple[int, Run]] = {}
    for each in seeds:
        for name, run in stored.runs.get(each, {}).items():
            found.setdefault(name, (each, run))
    return found


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
    stored = ", ".join(
        name if seed is None else f"{METHODS[name].title} (seed {seed})"
        for name, seed in result.stored.items()
    )
    told = [
        "In brackets 95 % intervals; ▼ and ▲: worse and better than base, item by item, p at most",
        "0.05. SFT's checkpoints are those of nearest new ability.",
    ]
    if stored:
        told.append(f"From stored runs, not measured now: {stored}.")
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
        worse = [words for name, words in _KEPT.items() if not is_kept(sft, main, name)]
        worse += ["KL from base (over three times)"] if sft.drift > 3 * main.drift else []
        text = (
            "SFT at the nearest new ability is worse than it, item by item, in two or more of these"
        )
        told.append((len(worse) >= 2, f"{text}: {', '.join(worse) or 'none'}"))
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
    right.set_ylim(bottom=0)
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
