"""A synthetic results file: invented scores, drawn so that methods and seeds differ."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.graders import wilson_interval

STAGES = ["front_desk", "kitchen", "garden"]
PLAN = "5eed" * 16
Raw = dict[str, Any]


def measured(items: dict[str, float]) -> Raw:
    """A measure as `continual` writes it, from the scores of its items."""
    total, n = sum(items.values()), len(items)
    low, high = wilson_interval(total, n)
    return {"accuracy": total / n, "low": low, "high": high, "n": n, "items": items}


def drawn(name: str, chance: float, n: int, draw: random.Random) -> Raw:
    """Items that are right by chance; each has its own ease, the same for all models."""
    ease = random.Random(name)
    shifts = [ease.uniform(-0.25, 0.25) for _ in range(n)]
    return measured(
        {f"{name}-{i}": float(draw.random() < chance + s) for i, s in enumerate(shifts)}
    )


def record(
    method: str, seed: int | None, stage: int, tasks: Raw, capabilities: Raw, **more: Any
) -> Raw:
    """One record with everything that `continual` writes."""
    names: list[str] = more.pop("stages", STAGES)
    return {
        "format": 1,
        "status": "finished",
        "error": None,
        "plan": PLAN,
        "method": method,
        "seed": seed,
        "stage": stage,
        "stage_name": names[stage - 1] if stage else None,
        "stages": names,
        "run": f"{method}/seed{seed}/{stage}" if stage else "base",
        "updates": 48 if stage else 0,
        "tokens": 12345 if stage else 0,
        "selected_step": 48 if stage else None,
        "seconds": {"fit": 61.5, "evaluate": 20.25},
        "tasks": tasks,
        "capabilities": capabilities,
        "drift": {"general": 0.3 * stage * (3 if method == "sft" else 1)},
        "curve": [],
        **more,
    }


def synthetic(
    methods: Iterable[str] = ("sdft", "sft"),
    seeds: Iterable[int] = (42, 43, 44),
    stages: list[str] = STAGES,
    n: int = 40,
) -> list[Raw]:
    """A base record and one of each method, seed and stage; all scores are invented."""
    draw = random.Random(0)

    def scores(losses: float, learned: int) -> tuple[Raw, Raw]:
        tasks = {
            name: drawn(name, 0.75 - losses * (learned - i) if i <= learned else 0.25, n, draw)
            for i, name in enumerate(stages, start=1)
        }
        general = drawn("general", 0.7 - losses * learned, n, draw)
        hella = {"acc": 0.31 - losses * learned / 5, "acc_stderr": 0.02, "acc_norm": 0.4}
        return tasks, {"general": general, "hellaswag": hella}

    found = [record("base", None, 0, *scores(0.0, 0), stages=stages)]
    for number, method in enumerate(methods):
        for seed in seeds:
            for stage, name in enumerate(stages, start=1):
                curve = [
                    {
                        "step": step,
                        f"task/{name}/accuracy": 0.3 + 0.4 * step / 48 - 0.02 * number,
                        "task/general/accuracy": 0.7 - 0.04 * (number + 1) * stage * step / 48,
                        "drift/general": 0.1 * stage * (number + 1) * step / 48 + seed / 1000,
                    }
                    for step in (0, 16, 32, 48)
                ]
                losses = 0.03 + 0.1 * number
                found.append(
                    record(method, seed, stage, *scores(losses, stage), stages=stages, curve=curve)
                )
    return found


@pytest.fixture(scope="session")
def shared_records() -> list[Raw]:
    return synthetic()


@pytest.fixture
def records(shared_records: list[Raw]) -> list[Raw]:
    """Two methods, three seeds, three stages; a copy to change at will."""
    return copy.deepcopy(shared_records)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write records as a results file and return its path."""

    def to_file(found: list[Raw], name: str = "results.jsonl") -> Path:
        path = tmp_path / name
        lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in found]
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return to_file


@pytest.fixture
def by_hand() -> list[Raw]:
    """Base and one method, two stages, two seeds, ten items a set, with round figures."""

    def share(name: str, right: int) -> Raw:
        return measured({f"{name}{i}": float(i < right) for i in range(10)})

    def scores(a: int, b: int, general: int) -> tuple[Raw, Raw]:
        return {"a": share("a", a), "b": share("b", b)}, {"general": share("general", general)}

    rows: list[tuple[str, int | None, int, tuple[int, int, int]]] = [
        ("base", None, 0, (1, 2, 8)),
        ("sdft", 1, 1, (8, 3, 7)),
        ("sdft", 1, 2, (6, 9, 6)),
        ("sdft", 2, 1, (6, 2, 8)),
        ("sdft", 2, 2, (6, 7, 7)),
    ]
    return [
        record(method, seed, stage, *scores(*values), stages=["a", "b"])
        for method, seed, stage, values in rows
    ]
