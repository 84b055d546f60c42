"""Results files to records: what one run of one stage came to, and what was wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sdft_lightning.errors import UserError, printable
from sdft_lightning.graders import wilson_interval

FORMAT = 1
BASE = "base"
# A standard error times this is half of a 95 % interval.
_NORMAL_95 = 1.96
_ROUNDING = 1e-6
_NO_METRICS = ("low", "high", "n", "items", "metric", "in_mean", "mean_of_items")
# Their values lie in [0, 1] by chance at most.
_NO_FRACTIONS = ("perplexity", "bits_per_byte")


class Measure(NamedTuple):
    """What a model scored on one set of items.

    Attributes:
        metric: Name of the metric, as recorded.
        value: Mean over the items, unless `mean_of_items` is false.
        low: Lower end of its 95 % interval; None where nothing is known about it.
        high: Upper end.
        n: Number of items; None where it was not recorded.
        items: Score of each item by its id; empty where they were not recorded.
        fraction: Whether the metric is a share in [0, 1], of which means can be formed.
        in_mean: Whether the mean of the retained abilities counts it: not the parts of a group of
            benchmarks, and not what stands in no mean of the run itself.
        mean_of_items: Whether the value is the mean of the items' scores: not of a perplexity,
            whose items have log-likelihoods.
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    items: Mapping[str, float]
    fraction: bool
    in_mean: bool = True
    mean_of_items: bool = True


class Record(NamedTuple):
    """One line of a results file.

    Attributes:
        source: File and line, for messages.
        finished: Whether the run ended well.
        error: What ended it otherwise.
        plan: Hash of the plan that it belongs to.
        method: Name of the method; `base` for the model before training.
        seed: Its seed; None for the base.
        stage: 1 for the first stage; 0 for the base.
        stages: Names of all stages of the plan, in order; each is the name of its task, too.
        run: Folder of the run.
        updates: Optimizer steps of this stage.
        tokens: Tokens that it trained on.
        selected_step: Step of the checkpoint that was evaluated.
        seconds: Time by name (fit, evaluate).
        tasks: By name of the task.
        capabilities: Held-out abilities by name.
        drift: KL from the base model by name, nats a token.
        curve: What validations during the stage measured, each with its `step`.
    """

    source: str
    finished: bool
    error: str | None
    plan: str
    method: str
    seed: int | None
    stage: int
    stages: tuple[str, ...]
    run: str
    updates: int | None
    tokens: int | None
    selected_step: int | None
    seconds: Mapping[str, float]
    tasks: Mapping[str, Measure]
    capabilities: Mapping[str, Measure]
    drift: Mapping[str, float]
    curve: tuple[Mapping[str, float], ...]

    def same_content(self, other: Record) -> bool:
        """Whether both say the same, but for where they stand and how long it took."""
        blank: dict[str, Any] = {"source": "", "run": "", "seconds": {}}
        return self._replace(**blank) == other._replace(**blank)


def plain(text: str) -> str:
    """A name or message on one line, without control characters."""
    return printable(text, None)


class _Fields:
    """Reads the fields of a JSON object and says where one is wrong."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def wrong(self, name: str, wanted: str) -> UserError:
        return UserError(
            f"{self.where}: {name} must be {wanted}; got {_short(self.raw.get(name))}. `continual` "
            "writes it so: correct the line, or take it out."
        )

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str) or not plain(value):
            raise self.wrong(name, "a text that is not empty")
        return plain(value)

    def whole(self, name: str) -> int | None:
        value = self.raw.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.wrong(name, "a whole number or null")
        return value

    def numbers(self, name: str) -> dict[str, float]:
        """Null is what was no number when it was measured; it is left out."""
        value = {key: each for key, each in self.mapping(name).items() if each is not None}
        if not all(_is_number(each) for each in value.values()):
            raise self.wrong(name, "an object of finite numbers")
        return {plain(key): float(each) for key, each in value.items()}

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.raw.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def measures(self, name: str) -> dict[str, Measure]:
        found = {}
        for key, value in self.mapping(name).items():
            if not isinstance(value, dict):
                raise self.wrong(name, f"an object of objects ({key} is none)")
            measure = parse_measure(value, f"{self.where}, {name}.{plain(key)}")
            if measure is not None:
                found[plain(key)] = measure
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_measure(raw: Mapping[str, Any], where: str) -> Measure | None:
    """Read what was measured on one set of items; None where there was nothing to measure.

    The metric is the one that `metric` names, or else `accuracy`, or else the first in the object.
    Its interval is `low` and `high`, or else value ± 1.96 `<metric>_stderr`, or else Wilson's on
    the items.

    Args:
        raw: The JSON object.
        where: File, line and name, for messages.

    Raises:
        UserError: If a value is missing or impossible.
    """
    fields = _Fields(raw, where)
    metrics = _metrics(raw)
    if not metrics:
        raise UserError(f"{where}: it has no metric. Give accuracy, or another one by its name.")
    metric = counted_metric(raw)
    if raw.get("metric") is not None:
        metric = raw["metric"]
        if metric not in metrics:
            raise fields.wrong("metric", f"one of {', '.join(metrics)}")
    n = fields.whole("n")
    if raw[metric] is None or n == 0:  # no number, or no item that anyone could judge
        return None
    if not _is_number(raw[metric]):
        raise fields.wrong(metric, "a finite number, or null")
    for name in ("in_mean", "mean_of_items"):
        if not isinstance(raw.get(name, True), bool):
            raise fields.wrong(name, "true or false")
    value = float(raw[metric])
    if metric == "accuracy" and not 0 <= value <= 1:
        raise fields.wrong(metric, "between 0 and 1")
    fraction = 0 <= value <= 1 and not any(part in metric for part in _NO_FRACTIONS)
    items = fields.numbers("items")
    mean_of_items = raw.get("mean_of_items", True)
    if mean_of_items and fraction and not all(0 <= score <= 1 for score in items.values()):
        raise fields.wrong("items", "an object of scores between 0 and 1")
    low, high = _interval(fields, metric, value, items, fraction)
    n = len(items) if n is None else n
    in_mean = raw.get("in_mean", True)
    return Measure(plain(metric), value, low, high, n, items, fraction, in_mean, mean_of_items)


def _metrics(raw: Mapping[str, Any]) -> list[str]:
    return [key for key in raw if key not in _NO_METRICS and not key.endswith("_stderr")]


def counted_metric(raw: Mapping[str, Any]) -> str:
    """The metric that counts where none is named: accuracy, or else the first."""
    metrics = _metrics(raw)
    return "accuracy" if "accuracy" in metrics else metrics[0]


def _interval(
    fields: _Fields, metric: str, value: float, items: Mapping[str, float], fraction: bool
) -> tuple[float | None, float | None]:
    raw, stderr = fields.raw, f"{metric}_stderr"
    if raw.get("low") is not None and raw.get("high") is not None:
        for name in ("low", "high"):
            if not _is_number(raw[name]):
                raise fields.wrong(name, "a finite number")
        if not raw["low"] - _ROUNDING <= value <= raw["high"] + _ROUNDING:
            raise fields.wrong("low", f"at most {metric} = {value}, and high at least that")
        return float(raw["low"]), float(raw["high"])
    if raw.get(stderr) is not None:
        if not _is_number(raw[stderr]):
            raise fields.wrong(stderr, "a finite number")
        half = _NORMAL_95 * raw[stderr]
        low, high = value - half, value + half
        return (max(0.0, low), min(1.0, high)) if fraction else (low, high)
    if items and fraction:
        return wilson_interval(value * len(items), len(items))
    return None, None


def parse_record(raw: Mapping[str, Any], where: str) -> Record:
    """Read one record.

    Args:
        raw: The JSON object of a line.
        where: File and line, for messages.

    Raises:
        UserError: If a field is missing or impossible.
    """
    fields = _Fields(raw, where)
    if raw.get("status") not in ("finished", "failed"):
        raise fields.wrong("status", "finished or failed")
    stages = _stages(fields)
    stage, method = fields.whole("stage"), fields.text("method")
    if stage is None or not 0 <= stage <= len(stages):
        raise fields.wrong("stage", f"0 (the base) to {len(stages)} (the number of stages)")
    if (method == BASE) != (stage == 0):
        raise fields.wrong("method", f"{BASE} at stage 0, and another name after it")
    if stage and raw.get("stage_name") not in (None, raw["stages"][stage - 1]):
        raise fields.wrong("stage_name", f"{stages[stage - 1]!r}, the name of stage {stage}")
    seed = fields.whole("seed")
    if (seed is None) != (stage == 0):
        raise fields.wrong("seed", "a whole number, or null for the base")
    return Record(
        source=where,
        finished=raw["status"] == "finished",
        error=plain(str(raw["error"])) if raw.get("error") else None,
        plan=fields.text("plan"),
        method=method,
        seed=seed,
        stage=stage,
        stages=stages,
        run=plain(str(raw.get("run") or "")),
        updates=fields.whole("updates"),
        tokens=fields.whole("tokens"),
        selected_step=fields.whole("selected_step"),
        seconds=fields.numbers("seconds"),
        tasks=fields.measures("tasks"),
        capabilities=fields.measures("capabilities"),
        drift=fields.numbers("drift"),
        curve=_curve(fields),
    )


def _stages(fields: _Fields) -> tuple[str, ...]:
    value = fields.raw.get("stages")
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise fields.wrong("stages", "a list of names")
    names = tuple(plain(name) for name in value)
    if not names or not all(names) or len(set(names)) < len(names):
        raise fields.wrong("stages", "a list of different names, at least one")
    return names


def _curve(fields: _Fields) -> tuple[dict[str, float], ...]:
    """The points of a learning curve; what was not measured at a step is left out."""
    value = fields.raw.get("curve") or []
    if not isinstance(value, list):
        raise fields.wrong("curve", "a list of objects")
    points = []
    for point in value:
        if not isinstance(point, dict) or not _is_number(point.get("step")):
            raise fields.wrong("curve", "a list of objects, each with its step")
        points.append({plain(key): float(x) for key, x in point.items() if _is_number(x)})
    return tuple(points)


class Problem(NamedTuple):
    """Something that a reader of the report must know.

    Attributes:
        kind: One or two words.
        text: A sentence: what, where, and what the report did about it.
        note: Whether all figures are the same as without it.
    """

    kind: str
    text: str
    note: bool = False


def read_records(paths: Sequence[Path]) -> tuple[list[Record], list[Problem]]:
    """Read results files, in the order given.

    Args:
        paths: JSON Lines files that `continual` wrote; one that is given twice is read once.

    Returns:
        The records, and what was left out: a last line that is cut short (the run was stopped while
        it wrote), and records of other format versions.

    Raises:
        UserError: If a file is absent, empty or malformed, or has no record that can be read.
    """
    if not paths:
        raise UserError("report: no results file was given. Name one, or several: RESULTS...")
    records: list[Record] = []
    problems: list[Problem] = []
    for path in {path.resolve(): path for path in paths}.values():
        versions: dict[str, list[int]] = {}
        for number, raw in _objects(path, problems):
            if raw.get("format") != FORMAT or isinstance(raw["format"], bool):
                versions.setdefault(repr(raw.get("format")), []).append(number)
            else:
                records.append(parse_record(raw, f"{path}, line {number}"))
        problems += [
            Problem(
                "unknown format",
                f"{path}: {len(lines)} records (lines {_listed(lines)}) have format {version}; "
                f"this version reads {FORMAT}. They were left out: make the report with the "
                "version that wrote them.",
            )
            for version, lines in versions.items()
        ]
    if not records:
        why = " ".join(problem.text for problem in problems)
        raise UserError(f"report: there is no record to report. {why}")
    return records, problems


def _objects(path: Path, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and JSON objects of a file; a torn last line becomes a problem."""
    # Not `splitlines`: names may hold characters that it takes for line ends (U+2028, say).
    lines = _content(path).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line.decode("utf-8"), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            cut = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
            if cut and number == len(lines):
                problems.append(
                    Problem(
                        "torn line",
                        f"{path}, line {number}: the last line is cut short; the run was probably "
                        "stopped while it wrote. The record was left out.",
                    )
                )
                return
            raise UserError(
                f"{path}, line {number}: malformed JSON ({printable(str(error))}). Each line "
                "holds one record; "
                "correct the line, or take it out."
            ) from error
        if not isinstance(raw, dict):
            raise UserError(
                f"{path}, line {number}: a record is a JSON object; got {type(raw).__name__}. Is "
                "this a results.jsonl of `continual`?"
            )
        yield number, raw


def _content(path: Path) -> bytes:
    if path.is_dir():
        inside = path / "results.jsonl"
        remedy = f"Name {inside}." if inside.is_file() else "Name a results.jsonl file."
        raise UserError(f"report: {path} is a folder. {remedy}")
    if not path.is_file():
        raise UserError(f"report: there is no file {path}. Correct the path.")
    content = path.read_bytes()
    if not content.strip():
        raise UserError(f"report: {path} is empty: no run has ended yet, or it is another file.")
    return content


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _listed(lines: list[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:5])
    return shown if len(lines) <= 5 else f"{shown}, ..."
