"""The report's figures for TensorBoard."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sdft_lightning.continual.report.looks import plain_text
from sdft_lightning.continual.report.plots import Picture, slug
from sdft_lightning.continual.report.records import Measure, Record
from sdft_lightning.continual.report.results import Method, Results
from sdft_lightning.continual.report.summary import Summary


def write_events(
    folder: Path,
    results: Results,
    summaries: Sequence[Summary],
    pictures: Mapping[str, Sequence[Picture]],
) -> None:
    """Write one TensorBoard run a seed (`<method>/seed<n>`), and one of means and plots a method.

    Scalars `stage/…` are over stages, `curve/…` over the optimizer steps of a stage, `summary/…`
    single figures; a custom-scalars layout puts the runs together, with intervals as margins.

    Args:
        folder: Where; it exists.
        results: The runs.
        summaries: What they came to.
        pictures: The plots.
    """
    names = {each.label: f"{i:02d}-{slug(each.label)}" for i, each in enumerate(summaries)}
    tags: dict[str, None] = {}
    by_label = {each.label: each for each in summaries}
    for method in results.methods:
        if method.label not in by_label:  # of a plan in which nothing has finished
            continue
        for seed in method.seeds:
            with _writer(folder / names[method.label] / f"seed{seed}") as writer:
                tags.update(_write_seed(writer, method, by_label[method.label], seed))
    for each in summaries:
        with _writer(folder / names[each.label]) as writer:
            for name, value in _mean_figures(each).items():
                writer.add_scalar(f"summary/{name}", value, 0)
    with _writer(folder) as writer:
        writer.add_custom_scalars(_layout(tags))
        for picture in (picture for group in pictures.values() for picture in group):
            _add_figure(writer, picture.name, picture.figure)


def _writer(folder: Path) -> Any:
    return SummaryWriter(str(folder))


def _add_figure(writer: Any, name: str, figure: Figure) -> None:
    with plain_text():
        writer.add_figure(name, figure, 0, close=False)


def _write_seed(writer: Any, method: Method, summary: Summary, seed: int) -> dict[str, None]:
    """Scalars and hyperparameters of one seed; returns the tags of the scalars."""
    tags: dict[str, None] = {}

    def add(tag: str, value: float, step: int) -> None:
        writer.add_scalar(tag, value, step)
        tags[tag] = None

    for stage in range(len(method.stages) + 1):
        record = method.base if stage == 0 else method.runs.get((seed, stage))
        if record is not None:
            for tag, value in _stage_scalars(record).items():
                add(tag, value, stage)
            for point in record.curve:
                for name, value in point.items():
                    if name != "step":
                        add(f"curve/{stage}/{name}", value, int(point["step"]))
    figures = _seed_figures(summary, seed)
    for name, value in figures.items():
        writer.add_scalar(f"summary/{name}", value, 0)
    if figures:
        _add_hparams(writer, method, seed, figures)
    return tags


def _stage_scalars(record: Record) -> dict[str, float]:
    found = {f"stage/drift/{name}": value for name, value in record.drift.items()}
    groups: tuple[tuple[str, Mapping[str, Measure]], ...] = (
        ("task", record.tasks),
        ("capability", record.capabilities),
    )
    for kind, measures in groups:
        for name, measure in measures.items():
            tag = f"stage/{kind}/{name}/{measure.metric}"
            found[tag] = measure.value
            if measure.low is not None and measure.high is not None:
                found[f"{tag}_low"], found[f"{tag}_high"] = measure.low, measure.high
    return found


def _seed_figures(summary: Summary, seed: int) -> dict[str, float]:
    """What one complete seed came to; nothing for one that is not complete."""
    found: dict[str, float] = {}
    for point in summary.points:
        if point.seed == seed:
            if point.new is not None:
                found["new_tasks"] = point.new.value
            if point.retained is not None:
                found["retained"] = point.retained.value
    if seed in summary.scores:
        scores = summary.scores[seed]._asdict()
        found.update({name: value for name, value in scores.items() if not math.isnan(value)})
    return found


def _mean_figures(summary: Summary) -> dict[str, float]:
    """Means over seeds, with the number of seeds that they are over."""
    found: dict[str, float] = {"complete_seeds": len(summary.complete)}
    for name, value in (("new_tasks", summary.new), ("retained", summary.retained)):
        if value is not None:
            found[name] = value.estimate.value
            if value.estimate.low is not None and value.estimate.high is not None:
                found[f"{name}_low"] = value.estimate.low
                found[f"{name}_high"] = value.estimate.high
    if summary.retained_change is not None:
        found["retained_change"] = summary.retained_change
    for name in ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer"):
        score = summary.mean_score(name)
        if score is not None:
            found[name] = score[0]
    return found


def _add_hparams(writer: Any, method: Method, seed: int, figures: Mapping[str, float]) -> None:
    """Write hyper-parameters; `SummaryWriter.add_hparams` would open a run of its own below."""
    settings = {"method": method.label, "seed": seed, "plan": method.plan}
    for part in hparams(settings, {f"summary/{name}": value for name, value in figures.items()}):
        writer.file_writer.add_summary(part)


def _layout(tags: Mapping[str, None]) -> dict[str, dict[str, list[Any]]]:
    """Charts over all runs: accuracies with margins, and each learning curve."""
    layout: dict[str, dict[str, list[Any]]] = {}
    for tag in tags:
        if tag.endswith(("_low", "_high")):
            continue
        if tag.startswith("stage/"):
            charts = layout.setdefault("After each stage", {})
            charts[tag] = ["Multiline", [f"^{re.escape(tag)}$"]]
            if f"{tag}_low" in tags:
                margins = layout.setdefault("After each stage, with 95 % intervals", {})
                margins[tag] = ["Margin", [tag, f"{tag}_low", f"{tag}_high"]]
        else:
            charts = layout.setdefault("Learning curves", {})
            charts[tag] = ["Multiline", [f"^{re.escape(tag)}$"]]
    return layout
