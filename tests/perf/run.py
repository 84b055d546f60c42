"""`make perf`: time our step, loss and sampling against others, and print what holds.

Everything is measured by turns in processes of their own; ratios are medians of one run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from processes import Side, Spread, alternate, ratios, run, seconds_of
from workload import Workload, random_model

from sdft_lightning.rollout.student import has_native_bfloat16

Row = tuple[str, str, str, str]


def peak(result: dict[str, Any]) -> float:
    """The peak of a worker, in GB."""
    return float(result["peak_gigabytes"])


def verdict(spread: Spread, target: float) -> str:
    """Whether the median keeps the target."""
    return f"{'yes' if spread.middle <= target else 'NO'} (≤ {target:.2f})"


def phase_lines(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Median seconds of each phase on each side, with tokens a second and peak memory."""
    lines = []
    for name, runs in results.items():
        phases: dict[str, list[float]] = {}
        for each in runs:
            for phase, values in each["phases"].items():
                phases.setdefault(phase, []).extend(values)
        counted = {phase: median(values) for phase, values in phases.items() if values}
        text = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in counted.items())
        steps = [seconds for each in runs for seconds in each["step"]]
        tokens = [count for each in runs for count in each["tokens"]]
        lines.append(
            f"    {name}: step {Spread.of(steps)} s ({text}); "
            f"{sum(tokens) / sum(steps):.0f} tokens/s; peak {max(map(peak, runs)):.2f} GB"
        )
    return lines


def compare_steps(
    title: str, sides: list[Side], rounds: int, step_target: float, peak_target: float | None
) -> tuple[list[Row], list[str], Any]:
    """One comparison of whole steps."""
    results = alternate(sides, rounds)
    first, second = sides[0].name, sides[1].name
    step = ratios(results, first, second, seconds_of)
    rows: list[Row] = [(title, f"step, {first} / {second}", str(step), verdict(step, step_target))]
    if peak_target is not None:
        memory = ratios(results, first, second, peak)
        rows.append((title, "peak memory", str(memory), verdict(memory, peak_target)))
    return rows, phase_lines(results), results


def against_trl(args: argparse.Namespace) -> Any:
    """Our step against TRL's, at the two settings."""
    rows, lines, data = [], [], []
    base = Workload(precision=args.precision, steps=args.steps or 4)
    windows = replace(base, micro_batch=8, accumulate=4, new_tokens=96, forced=False)
    windows = replace(windows, steps=args.steps or 3)
    for title, workload, memory in (
        ("16 prompts, 48 new tokens", base, 0.65),
        ("4 x 8 prompts, up to 96 new tokens, natural ends", windows, None),
    ):
        sides = [
            Side("ours", "ours.py", ["sdft", workload.dump()]),
            Side("TRL", "trl_step.py", [workload.dump()]),
        ]
        found, text, results = compare_steps(title, sides, args.rounds, 0.50, memory)
        rows += found
        lines += [f"  {title}", *text]
        data.append({"workload": workload.dump(), "results": results})
    return rows, lines, data


def against_sft(args: argparse.Namespace) -> Any:
    """Our SDFT step against our SFT step: completions as long as the demonstrations."""
    workload = Workload(precision=args.precision, steps=args.steps or 4)
    sides = [
        Side("SDFT", "ours.py", ["sdft", workload.dump()]),
        Side("SFT", "ours.py", ["sft", workload.dump()]),
    ]
    title = "16 prompts, 48 tokens"
    rows, text, results = compare_steps(title, sides, args.rounds, 2.0, None)
    return rows, [f"  {title}", *text], [{"workload": workload.dump(), "results": results}]


def sampling(args: argparse.Namespace) -> Any:
    """Sampling against transformers' generate, with equal and heavy-tailed lengths."""
    rows: list[Row] = []
    lines, data = [], []
    others = {"generate": "generate"}
    if args.precision == "bf16":
        others["generate_copy"] = "generate over our bfloat16 copy"
    for kind, new_tokens, target in (("equal", 48, 0.60), ("tail", 128, 0.40)):
        workload = replace(Workload(precision=args.precision), new_tokens=new_tokens)
        sides = [
            Side(name, "sampling.py", [name, workload.dump(), kind]) for name in ("ours", *others)
        ]
        results = alternate(sides, args.rounds)
        title = {"equal": f"all {new_tokens} tokens", "tail": f"1 in 8 has {new_tokens}, others 16"}
        for other, words in others.items():
            ratio = ratios(results, "ours", other, seconds_of)
            rows.append(
                (f"16 rows, {title[kind]}", f"ours / {words}", str(ratio), verdict(ratio, target))
            )
        for name, runs in results.items():
            seconds = Spread.of([seconds_of(each) for each in runs])
            lines.append(f"    {title[kind]}, {name}: {seconds} s")
        data.append({"workload": workload.dump(), "lengths": kind, "results": results})
    return rows, lines, data


def loss(args: argparse.Namespace) -> Any:
    """The bounded-memory loss against the plain one, over N and V."""
    rows: list[Row] = []
    lines, data = [], []
    for tokens, vocabulary, size in ((768, 49152, 576), (2048, 49152, 576), (1024, 151936, 896)):
        shape = [str(tokens), str(vocabulary), str(size)]
        sides = [Side(name, "loss.py", [name, *shape]) for name in ("bounded", "plain")]
        results = alternate(sides, args.rounds)
        ratio = ratios(results, "bounded", "plain", seconds_of)
        title = f"N {tokens}, V {vocabulary}, D {size}"
        rows.append((title, "bounded / plain, seconds", str(ratio), verdict(ratio, 1.25)))
        for name, runs in results.items():
            extra = max(each["extra_gigabytes"] for each in runs)
            seconds = Spread.of([seconds_of(each) for each in runs])
            lines.append(f"    {title}, {name}: {seconds} s, {extra:.2f} GB beyond its inputs")
        data.append({"shape": shape, "results": results})
    extras = {}
    for tokens in (1024, 4096, 16384):
        found = run(Side("bounded", "loss.py", ["bounded", str(tokens), "49152", "576"]))
        extras[tokens] = found["extra_gigabytes"]
        lines.append(f"    N {tokens}, V 49152, bounded: {extras[tokens]:.2f} GB beyond its inputs")
    growth = Spread.of([extras[16384] / extras[1024]])
    rows.append(
        ("N from 1,024 to 16,384", "extra peak, 16k / 1k", str(growth), verdict(growth, 1.10))
    )
    return rows, lines, [*data, {"extras": extras}]


def scaling(args: argparse.Namespace) -> Any:
    """How our step grows with batch, lengths and completions; the figures are for reading."""
    base = Workload(precision=args.precision, steps=3)
    variants = {
        "16 prompts of 93, 48 new": base,
        "8 prompts": replace(base, micro_batch=8),
        "32 prompts": replace(base, micro_batch=32),
        "prompts of 186": replace(base, prompt_tokens=186),
        "24 new": replace(base, new_tokens=24),
        "96 new": replace(base, new_tokens=96),
        "4 prompts x 4 completions": replace(base, micro_batch=4, completions=4),
        "frozen teacher": replace(base, frozen_teacher=True),
        "gradient checkpointing": replace(base, checkpointing=True),
        "4 x 4 prompts": replace(base, micro_batch=4, accumulate=4),
        "4 x 4 prompts, gradient checkpointing": replace(
            base, micro_batch=4, accumulate=4, checkpointing=True
        ),
    }
    lines, data = [], []
    for title, workload in variants.items():
        result = run(Side(title, "ours.py", ["sdft", workload.dump()]))
        lines += [line.strip() for line in phase_lines({title: [result]})]
        data.append({"workload": workload.dump(), "result": result})
    return [], [f"    {line}" for line in lines], data


def memory(args: argparse.Namespace) -> Any:
    """What the plan says that a step needs, and what it takes, for two sizes."""
    lines, data = [], []
    base = Workload(precision=args.precision, steps=2)
    for title, model in (("embedded", base.model), ("random, 362M", str(random_model()))):
        for micro_batch, accumulate in ((16, 1), (4, 4)):
            workload = replace(base, model=model, micro_batch=micro_batch, accumulate=accumulate)
            result = run(Side(title, "ours.py", ["sdft", workload.dump()]))
            before, planned = result["before_gigabytes"], result["planned_gigabytes"]
            taken = peak(result) - before
            lines.append(
                f"    {title}, {accumulate} x {micro_batch} prompts: {taken:.2f} GB above the "
                f"{before:.2f} of the libraries, planned {planned:.2f} ({taken / planned:.2f})"
            )
            data.append({"workload": workload.dump(), "result": result})
    return [], lines, data


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "trl": against_trl,
    "sft": against_sft,
    "sampling": sampling,
    "loss": loss,
    "scaling": scaling,
    "memory": memory,
}


def main() -> int:
    """Measure the parts that are asked for, print the table, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--precision",
        choices=("float32", "bf16"),
        default="bf16" if has_native_bfloat16(torch.device("cpu")) else "float32",
        help="bf16 (autocast) where the processor multiplies bfloat16, else float32",
    )
    parser.add_argument(
        "--steps", type=int, help="of each process of trl and sft, the first not counted"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/perf"))
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.steps is not None and args.steps < 2:
        parser.error(f"--steps {args.steps}: at least 2, since the first is not counted")
    if "trl" in args.parts and find_spec("trl") is None:
        parser.error("trl is not installed: pip install -e '.[perf]', or `make perf`")
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"steps in {args.precision}")
    if args.precision == "float32":
        print(
            "The targets of whole steps are for bfloat16. In float32 the matrix products decide, "
            "which both sides have in common. In bfloat16, which this processor does not multiply, "
            "a step of TRL's takes many minutes: "
            "make perf PERF='trl sft sampling --precision bf16 --rounds 1 --steps 2'."
        )
    table: list[Row] = []
    for part in args.parts:
        print(f"\n{part} ({time.strftime('%H:%M:%S')})", flush=True)
        rows, lines, data = PARTS[part](args)
        table += rows
        print("\n".join(lines), flush=True)
        path = args.output / f"{time.strftime('%Y%m%d-%H%M%S')}-{part}.json"
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    print("\n| setting | ratio | median (least-greatest) | holds |\n|---|---|---|---|")
    for row in table:
        print("| " + " | ".join(row) + " |")
    return 0 if all(row[3].startswith("yes") for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
