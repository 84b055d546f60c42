"""Write the README's first table, means of all seeds of `make demo`, and its picture.

    python scripts/demo_table.py                       # the table
    python scripts/demo_table.py --picture demo.png    # and the picture, of one seed

The runs are those that `make demo DEMO=--store=...` has written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from sdft_lightning.cli.demo import STORED
from sdft_lightning.cli.demo_result import (
    METHODS,
    DemoResult,
    Measured,
    Stored,
    draw,
    findings,
    load_stored,
    mark,
)

MEASURES = ("new", "instructions", "general")


def results_of(stored: Stored) -> dict[int, DemoResult]:
    """What each seed's demo came to, from stored runs."""
    assert stored.base is not None, "the base model was not stored"
    return {seed: DemoResult(*stored.base, runs, {}) for seed, runs in stored.runs.items()}


def table_of_seeds(stored: Stored) -> str:
    """One row a method: means, each seed in parentheses, and in how many seeds base is left."""
    results = list(results_of(stored).values())
    base = results[0].base
    lines = [
        "| | new ability | instructions followed | general questions | perplexity | KL from base |",
        "|---|---|---|---|---|---|",
        f"| base | {' | '.join(f'{100 * base.share(name).value:.0f} %' for name in MEASURES)} "
        f"| {base.perplexity:.1f} | 0.00 |",
    ]
    for name in sorted(METHODS, key=lambda each: each != "sdft_retain"):
        models = [result.runs[name].measured for result in results if name in result.runs]
        if not models:
            continue
        steps = ", ".join(str(step) for step in dict.fromkeys(model.step for model in models))
        title = f"{METHODS[name].title}, {steps} steps"
        cells = [_shares(models, base, measure) for measure in MEASURES]
        cells.append(_cell([m.perplexity for m in models], "{:.1f}".format))
        cells[-1] += _marks(models, base, "text")
        cells.append(_cell([model.drift for model in models], "{:.2f}".format))
        lines.append(
            f"| {f'**{title}**' if name == 'sdft_retain' else title} | {' | '.join(cells)} |"
        )
    teacher = f"{100 * results[0].teacher:.0f} %"
    return "\n".join([*lines, f"| teacher, with source text and answer | {teacher} | | | | |"])


def _shares(models: list[Measured], base: Measured, name: str) -> str:
    text = _cell([100 * model.share(name).value for model in models], "{:.0f}".format, " %")
    return text + _marks(models, base, name)


def _cell(values: list[float], show: Callable[[float], str], unit: str = "") -> str:
    each = f" ({', '.join(show(value) for value in values)})" if len(values) > 1 else ""
    return f"{show(mean(values))}{unit}{each}"


def _marks(models: list[Measured], base: Measured, name: str) -> str:
    if len(models) == 1:
        return mark(models[0], base, name)
    found = [mark(model, base, name).strip() for model in models]
    return "".join(
        f" {sign} {found.count(sign)}/{len(found)}" for sign in ("▼", "▲") if sign in found
    )


def main() -> None:
    """Print the table and each seed's findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stored", type=Path, default=STORED)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seed", type=int, default=42, help="whose runs the picture shows")
    options = parser.parse_args()
    stored = load_stored(options.stored)
    print(table_of_seeds(stored))
    for seed, result in results_of(stored).items():
        print("\n".join([f"\nSeed {seed}:", *findings(result)]))
        for name, run in result.runs.items():
            print(f"{METHODS[name].title}: {run.seconds:.1f} seconds a step (median)")
            for measure in (*MEASURES, "text"):
                paired = run.measured.against(result.base, measure)
                print(f"  {measure}: lost {paired.lost}, gained {paired.gained}, p {paired.p:.2g}")
    if options.picture is not None:
        draw(results_of(stored)[options.seed], options.picture)


if __name__ == "__main__":
    main()
