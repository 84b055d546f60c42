"""Learning curves: what validations measured while the stages ran, one line a method and seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from sdft_lightning.report.checks import Method


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
        by_seed = {seed: _points(method, seed) for seed in method.seeds}
        names = dict.fromkeys(name for points in by_seed.values() for name in points)
        for name in names:
            lines = found.setdefault(name, [])
            for seed, points in by_seed.items():
                if name in points:
                    steps, values = zip(*points[name], strict=True)
                    lines.append(Line(method.label, seed, steps, values))
            mean = _mean(method.label, [points.get(name, []) for points in by_seed.values()])
            if mean is not None:
                lines.append(mean)
    return found


_Points = list[tuple[float, float]]


def _points(method: Method, seed: int) -> dict[str, _Points]:
    """(step, value) by name, up to the first stage that is missing."""
    found: dict[str, _Points] = {}
    before = 0.0
    for stage in range(1, len(method.stages) + 1):
        record = method.runs.get((seed, stage))
        if record is None:
            break
        for point in record.curve:
            for name, value in point.items():
                if name != "step":
                    found.setdefault(name, []).append((before + point["step"], value))
        last = max((point["step"] for point in record.curve), default=0.0)
        before += last if record.updates is None else record.updates
    return found


def _mean(label: str, seeds: Sequence[_Points]) -> Line | None:
    by_step = [dict(points) for points in seeds]  # of a stage's end and the next one's start: this
    shared = [step for step in by_step[0] if all(step in each for each in by_step)]
    if not shared:
        return None
    values = tuple(fmean(each[step] for each in by_step) for step in shared)
    return Line(label, None, tuple(shared), values)


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
