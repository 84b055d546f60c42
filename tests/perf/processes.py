"""Workers in processes of their own, by turns, and ratios of what they report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent


class Side(NamedTuple):
    """One of two that are compared.

    Attributes:
        name: What it is called in tables.
        script: File in this folder.
        arguments: Its command line.
    """

    name: str
    script: str
    arguments: Sequence[str]


class Spread(NamedTuple):
    """Several ratios or seconds."""

    low: float
    middle: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Least, median and greatest."""
        return Spread(min(values), median(values), max(values))

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}-{self.high:.2f})"


def run(side: Side) -> dict[str, Any]:
    """Start a worker and read its result line.

    Raises:
        RuntimeError: If it failed; its output is in the message.
    """
    command = [sys.executable, str(FOLDER / side.script), *side.arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        output = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
        raise RuntimeError(f"{' '.join(command)} failed:\n{output}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def alternate(sides: Sequence[Side], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run each side once a round, in an order that turns, so that a slow minute hits both.

    Args:
        sides: Who is compared.
        rounds: How often.

    Returns:
        The results of each side, by name, in the order of the rounds.
    """
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for turn in range(rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            results[side.name].append(run(side))
            print(f"  {side.name}, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return results


def seconds_of(result: dict[str, Any]) -> float:
    """The median seconds of a worker's steps, or the seconds that it reports."""
    return float(median(result["step"]) if "step" in result else result["seconds"])


def ratios(results: dict[str, list[dict[str, Any]]], first: str, second: str, of: Any) -> Spread:
    """First over second, round by round."""
    pairs = zip(results[first], results[second], strict=True)
    return Spread.of([of(one) / of(other) for one, other in pairs])
