"""The layout of TensorBoard's tab Custom Scalars."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from sdft_lightning.modules.run_callbacks import dashboard_layout


def written(folder: Path) -> tuple[list[Layout], list[str]]:
    """The layouts in the events of a run, and the names of its scalars."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    found = []
    for event in events.Tensors("custom_scalars__config__"):
        layout = Layout()
        layout.ParseFromString(event.tensor_proto.string_val[0])
        found.append(layout)
    return found, events.Tags()["scalars"]


def shown(layout: Layout, scalars: list[str]) -> dict[str, dict[str, list[str]]]:
    """The scalars that each chart shows, found as TensorBoard finds them."""
    return {
        category.title: {
            chart.title: [
                name
                for pattern in chart.multiline.tag
                for name in scalars
                if re.compile(pattern).match(name)
            ]
            for chart in category.chart
        }
        for category in layout.category
    }


def test_it_opens_with_what_is_learned_what_is_kept_and_drift() -> None:
    names = [
        *("train/loss", "train/kl", "train/student_entropy", "train/completion_length"),
        *("val/task/clinic/accuracy", "val/task/clinic/accuracy_low"),
        *("val/task/general/accuracy", "val/task/general/answer_words", "val/drift/general"),
        *("val/capability/mean", "val/capability/mean_stderr"),
        *("val/capability/kept_text/word_perplexity", "val/capability/kept/answer_words"),
        *("val/paired/general/accuracy/lost", "val/paired/general/accuracy/p"),
    ]
    layout = dashboard_layout(names, ["general"])
    assert list(layout) == ["Learned and kept", "Training"]
    first = layout["Learned and kept"]
    assert list(first) == ["New ability", "Kept abilities", "Drift", "Lost", "Perplexity"]
    assert first["New ability"] == ["Multiline", ["val/task/clinic/accuracy$"]]
    kept = ["val/task/general/accuracy$", "val/capability/mean$"]
    assert first["Kept abilities"] == ["Multiline", kept]
    assert first["Drift"] == ["Multiline", ["val/drift/general$"]]
    assert first["Lost"] == ["Multiline", ["val/paired/general/accuracy/lost$"]]
    text = first["Perplexity"]
    assert text == ["Multiline", ["val/capability/kept_text/word_perplexity$"]]
    assert list(layout["Training"]) == ["Loss and KL", "Tokens of a completion"]
    assert layout["Training"]["Loss and KL"] == ["Multiline", ["train/loss$", "train/kl$"]]


def test_a_run_that_logs_nothing_known_has_no_layout() -> None:
    assert dashboard_layout(["perf/step_seconds"], []) == {}


def test_a_run_shows_what_it_logs_and_goes_on_with_one_layout(
    run_cli: Callable[..., None], fit_args: list[str], train_file: Path, tmp_path: Path
) -> None:
    graded = [f"--data.validation={train_file}", "--data.grader=contains"]
    graded += ["--data.columns.reference=reference", "--trainer.log_every_n_steps=1"]
    graded += ["--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    graded += ["--checkpoint.every_n_train_steps=2"]
    run_cli(*fit_args, *graded)
    (layout,), scalars = written(tmp_path / "runs" / "a")
    found = shown(layout, scalars)
    assert found["Learned and kept"] == {"New ability": ["val/task/task/accuracy"]}
    assert found["Training"]["Loss and KL"] == ["train/loss", "train/kl"]
    assert found["Training"]["Teacher's distance"] == ["train/teacher_distance"]
    assert all(names for of in found.values() for names in of.values()), "no chart is empty"
    run_cli(*fit_args, *graded, "--trainer.max_steps=4", "--ckpt_path=last")
    layouts, _ = written(tmp_path / "runs" / "a")
    assert layouts[1:] == [layout], "a resumed run writes the same again"


def test_a_script_with_a_logger_of_its_own_has_the_layout(
    fit_module: Callable[..., Any], tmp_path: Path
) -> None:
    fit_module(logger=TensorBoardLogger(str(tmp_path / "tb"), name="", version=""))
    (layout,), _ = written(tmp_path / "tb")
    assert [category.title for category in layout.category] == ["Training"]
