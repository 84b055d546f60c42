"""The report's figures in TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from sdft_lightning.continual.report import write_report

Raw = dict[str, Any]


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


@pytest.fixture
def folder(by_hand: list[Raw], write: Callable[..., Path], tmp_path: Path) -> Path:
    by_hand[1]["curve"] = [{"step": 16, "drift/general": 0.25}]
    return write_report([write(by_hand)], tmp_path / "out") / "tensorboard"


def test_runs_are_methods_and_seeds(folder: Path) -> None:
    runs = {str(path.parent.relative_to(folder)) for path in folder.rglob("events*")}
    assert runs == {".", "00-base", "01-sdft", "01-sdft/seed1", "01-sdft/seed2"}


def test_scalars_are_the_figures(folder: Path) -> None:
    seed = events(folder / "01-sdft" / "seed1")
    assert scalars(seed, "stage/task/a/accuracy") == [
        (0, pytest.approx(0.1)),
        (1, pytest.approx(0.8)),
        (2, pytest.approx(0.6)),
    ]
    assert scalars(seed, "stage/capability/general/accuracy")[2] == (2, pytest.approx(0.6))
    assert scalars(seed, "curve/1/drift/general") == [(16, 0.25)]
    assert scalars(seed, "summary/backward_transfer") == [(0, pytest.approx(-0.2))]
    mean = events(folder / "01-sdft")
    assert scalars(mean, "summary/new_tasks") == [(0, pytest.approx(0.7))]
    assert scalars(mean, "summary/backward_transfer") == [(0, pytest.approx(-0.1))]
    assert scalars(mean, "summary/complete_seeds") == [(0, 2.0)]


def test_layout_plots_and_hyperparameters(folder: Path) -> None:
    top = events(folder)
    assert set(top.Tags()["images"]) == {"pareto", "matrix-1", "curve-1-drift-general"}
    layout = layout_pb2.Layout()
    layout.ParseFromString(top.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    margin = charts["stage/task/a/accuracy"].margin.series[0]
    assert (margin.value, margin.lower) == ("stage/task/a/accuracy", "stage/task/a/accuracy_low")
    assert "curve/1/drift/general" in charts
    seed = events(folder / "01-sdft" / "seed2")
    content = seed.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["method"].string_value == "sdft"
    assert start.hparams["seed"].number_value == 2
