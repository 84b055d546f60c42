"""Learning curves: what validations measured while the stages ran, one line a method and seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from sdft_lightning.continual.report.checks import Method


class Line(NamedTuple):
    """One curve.

    Attributes:
        label: Of its method.
        seed: Its seed; None for the mean over all seeds of the method.
        steps: Optimizer steps since the base model, over all stages.
        values: What was measured there.
    """

    label: str
    seed: int | None
    steps: tuple[float, ...]
    values: tuple[float, ...]


def learning_curves(methods: Sequence[Method]) -> dict[str, list[Line]]:
    """Curves by the name of what was measured.

    A mean is formed at the steps that all seeds of the method have, and nowhere else: a line over
    fewer seeds would jump where one ends.
    """
    found: dict[str, list[Line]] = {}
    for method in methods:
        by_seed = {seed: _values(method, seed) for seed in method.seeds}
        for name in dict.fromkeys(name for values in by_seed.values() for name in values):
            lines = found.setdefault(name, [])
            for seed, values in by_seed.items():
                if name in values:
                    lines.append(_line(method.label, seed, values[name]))
            mean = _mean([values.get(name, {}) for values in by_seed.values()])
            if mean:
                lines.append(_line(method.label, None, mean))
    return found


# (stage, step since the base model): where a stage ends and the next begins, both have a value.
_Values = dict[tuple[int, float], float]


def _values(method: Method, seed: int) -> dict[str, _Values]:
    """What was measured, by name, up to the first stage that is missing."""
    found: dict[str, _Values] = {}
    before = 0.0
    for stage in range(1, len(method.stages) + 1):
        record = method.runs.get((seed, stage))
        if record is None:
            break
        for point in record.curve:
            for name, value in point.items():
                if name != "step":
                    found.setdefault(name, {})[stage, before + point["step"]] = value
        last = max((point["step"] for point in record.curve), default=0.0)
        before += last if record.updates is None else record.updates
    return found


def _line(label: str, seed: int | None, values: _Values) -> Line:
    return Line(label, seed, tuple(step for _, step in values), tuple(values.values()))


def _mean(seeds: Sequence[_Values]) -> _Values:
    shared = [place for place in seeds[0] if all(place in values for values in seeds)]
    return {place: fmean(values[place] for values in seeds) for place in shared}


def stage_starts(methods: Sequence[Method]) -> list[tuple[float, str]]:
    """Where each stage but the first begins, and its name; nothing where runs differ in it."""
    found: set[tuple[tuple[float, str], ...]] = set()
    for method in methods:
        for seed in method.complete_seeds():
            before, starts = 0, []
            for stage, name in enumerate(method.stages, start=1):
                starts.append((float(before), name))
                before += method.runs[seed, stage].updates or 0
            found.add(tuple(starts[1:]))
    return list(found.pop()) if len(found) == 1 else []


def curve_title(name: str) -> str:
    """The name of a curve in words: `task/<name>/<metric>` and `drift/<name>` are taken apart."""
    kind, _, rest = name.partition("/")
    if kind == "drift" and rest:
        return f"{rest}: KL from base"
    task, slash, metric = rest.rpartition("/")
    return f"{task}: {metric}" if slash else name
