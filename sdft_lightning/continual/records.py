"""From the files of a run to its record, and from files of records to what is finished."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from sdft_lightning.callbacks.metrics_log import BENCHMARKS_FILE
from sdft_lightning.continual.plan import BASE, ContinualPlan, Unit
from sdft_lightning.continual.report.records import counted_metric
from sdft_lightning.errors import UserError
from sdft_lightning.files.run_folder import ITEM_SCORES
from sdft_lightning.files.whole_files import read_records

FORMAT = 1
_ROUNDING = 1e-6
Key = tuple[str, int | None, int]


def empty_record(plan: ContinualPlan, plan_hash: str, unit: Unit | None) -> dict[str, Any]:
    """The fields of a record that are known beforehand; of the base model without a unit."""
    return {
        "format": FORMAT,
        "status": "failed",
        "error": None,
        "plan": plan_hash,
        "method": BASE if unit is None else unit.method,
        "seed": None if unit is None else unit.seed,
        "stage": 0 if unit is None else unit.number,
        "stage_name": None if unit is None else unit.stage.name,
        "stages": [stage.name for stage in plan.stages],
        "run": BASE if unit is None else unit.run,
        "updates": None,
        "tokens": None,
        "selected_step": None,
        "seconds": {},
        "tasks": {},
        "capabilities": {},
        "drift": {},
        "curve": [],
    }


def key_of(record: Mapping[str, Any]) -> Key:
    """What tells a record from others."""
    return record["method"], record["seed"], record["stage"]


def all_records(folder: Path, plan_hash: str) -> dict[Key, dict[str, Any]]:
    """The newest record of each run, in the files of all shares.

    Raises:
        UserError: If a record is of another plan.
    """
    found: dict[Key, dict[str, Any]] = {}
    for path in sorted(folder.glob("results*.jsonl")):
        for record in read_records(path):
            if record["plan"] != plan_hash:
                raise UserError(
                    f"{path}: the record of {record['run']} is of another plan. Take the file out "
                    "of this plan's folder."
                )
            before = found.get(key_of(record))
            if before is None or before["status"] != "finished":
                found[key_of(record)] = record
    return found


def measured(folder: Path, tasks: list[str], held_out: list[str]) -> dict[str, Any]:
    """What a `test` measured.

    Args:
        folder: Where it wrote metrics.jsonl, items.jsonl and item_scores.jsonl.
        tasks: Names of the stages.
        held_out: Names of the held-out sets.

    Returns:
        `tasks`, `capabilities` and `drift` of a record.
    """
    metrics = _lines(folder / "metrics.jsonl")[-1]
    items = _items(folder)
    graded = {name: _graded(name, metrics, items) for name in held_out}
    benchmarks = _benchmarks(folder, metrics)
    # A held-out set may have the name of a benchmark.
    renamed = {f"{name} (benchmark)" if name in graded else name: x for name, x in benchmarks}
    return {
        "tasks": {name: _graded(name, metrics, items) for name in tasks},
        "capabilities": {**graded, **renamed},
        "drift": {
            name.removeprefix("test/drift/"): value
            for name, value in metrics.items()
            if name.startswith("test/drift/")
        },
    }


def _benchmarks(folder: Path, metrics: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The harness's figures by task; which metric counts, and what is in no mean, is marked."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        kind, _, rest = name.removeprefix("test/").partition("/")
        benchmark, _, metric = rest.rpartition("/")
        if kind == "capability" and benchmark:  # without one: the mean, which reports form anew
            found.setdefault(benchmark, {})[metric] = value
    path = folder / BENCHMARKS_FILE
    if not path.is_file():
        return _with_items(folder, found)
    chosen: dict[str, str | None] = {}
    for task in json.loads(path.read_text(encoding="utf-8")):
        whole = task["name"] in found
        for name in [task["name"]] if whole else task["leaves"]:
            chosen[name] = task["metric"]
    for name, values in found.items():
        if name not in chosen:
            values["in_mean"] = False
        elif chosen[name] is not None:
            values["metric"] = chosen[name]
    return _with_items(folder, found)


def _with_items(
    folder: Path, benchmarks: dict[str, dict[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """Add the scores of single items under the metric that counts, where they are known."""
    path = folder / ITEM_SCORES
    lines = _lines(path) if path.is_file() else []
    scores = {
        (line["task"], line["metric"]): line["scores"]
        for line in lines
        if line["kind"] == "capability" and line["stage"] == "test"
    }
    for name, values in benchmarks.items():
        metric = values.get("metric") or counted_metric(values)
        known = scores.get((name, metric), {})
        items = {key: score for key, score in known.items() if score is not None}
        if items and values[metric] is not None:
            values |= {"n": len(items), "items": items}
            if abs(values[metric] - fmean(items.values())) > _ROUNDING:
                values["mean_of_items"] = False
    return list(benchmarks.items())


def _graded(name: str, metrics: Mapping[str, Any], items: Mapping[str, Any]) -> dict[str, Any]:
    accuracy = f"test/task/{name}/accuracy"
    scores = items.get(name, {})
    return {
        "accuracy": metrics.get(accuracy),  # none where a judge gave no verdict at all
        "low": metrics.get(f"{accuracy}_low"),
        "high": metrics.get(f"{accuracy}_high"),
        "n": len(scores),
        "items": scores,
    }


def _items(folder: Path) -> dict[str, dict[str, float]]:
    """Scores by task and row, those without a verdict left out."""
    scores: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("items*.jsonl")):
        for line in _lines(path):
            if line["score"] is not None:
                scores.setdefault(line["task"], {})[line["id"]] = line["score"]
    return scores


def curve(folder: Path) -> list[dict[str, Any]]:
    """The validations of a fit by step; of one that was done twice, the later."""
    path = folder / "metrics.jsonl"
    by_step: dict[int, dict[str, Any]] = {}
    for record in _lines(path) if path.is_file() else []:
        if record["stage"] == "validation":
            values = {
                name.removeprefix("val/"): value
                for name, value in record.items()
                if re.fullmatch(r"val/(task/.+/accuracy|drift/.+)", name)
            }
            by_step[record["step"]] = {"step": record["step"], **values}
    return [by_step[step] for step in sorted(by_step)]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that can be read: a killed process may have cut one short."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
