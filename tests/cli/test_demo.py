"""The demo's table, its claims and its course, on made-up figures and on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdft_lightning.cli.demo import DemoResult, Point, findings, points_of, run_demo, table

BASE = Point(0, 0.0, 0.8, 0.0)
GOOD = Point(80, 0.8, 0.78, 0.3)


def test_matched_sft_is_the_checkpoint_of_nearest_new_ability() -> None:
    sft = [Point(10, 0.3, 0.7, 0.5), Point(20, 0.75, 0.7, 1.2), Point(30, 0.99, 0.6, 1.9)]
    assert DemoResult(BASE, 0.95, [GOOD], sft).matched_sft.step == 20


def test_each_claim_is_reported_as_shown_or_not() -> None:
    sft = [Point(20, 0.8, 0.7, 1.2)]
    assert all(line.startswith("- shown") for line in findings(DemoResult(BASE, 0.95, [GOOD], sft)))
    worse = {
        0: GOOD._replace(new=0.49),
        1: GOOD._replace(new=0.75),
        2: GOOD._replace(drift=0.41),
        3: GOOD._replace(general=0.74),
        4: GOOD._replace(general=0.69),
    }
    for claim, point in worse.items():
        lines = findings(DemoResult(BASE, 0.95, [point], sft))
        assert lines[claim].startswith("- NOT shown"), claim


def test_table_names_every_model_and_its_figures() -> None:
    sft = [Point(10, 0.7, 0.7, 1.2), Point(80, 1.0, 0.5, 2.2)]
    text = table(DemoResult(BASE, 0.95, [Point(40, 0.5, 0.8, 0.2), GOOD], sft))
    assert "| base | 0% | 80% | 0.00 nats |" in text
    assert "| **SDFT**, 80 steps | 80% | 78% | 0.30 nats |" in text
    assert "| SFT, 10 steps (nearest new ability) | 70% | 70% | 1.20 nats |" in text
    assert "| SFT, 80 steps | 100% | 50% | 2.20 nats |" in text


def test_only_validations_become_points() -> None:
    record = {
        "stage": "validation",
        "step": 5,
        "val/task/front_desk/accuracy": 0.5,
        "val/task/general/accuracy": 0.7,
        "val/drift/general": 0.1,
    }
    assert points_of([{"stage": "train", "step": 1}, record]) == [Point(5, 0.5, 0.7, 0.1)]


def test_demo_runs_from_nothing_to_table_and_plot(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdft_lightning.cli import main

    monkeypatch.setattr("sys.argv", ["sdft"])
    small = [
        f"--model.policy.name={model_folder}",
        "--model.evaluation.max_new_tokens=3",
        "--data.eval_batch_size=8",
        "--trainer.limit_val_batches=1",
        "--trainer.limit_test_batches=1",
        "--data.lengths.teacher_prompt=4096",
    ]
    small_fit = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--data.batch_size=2"]

    def command(arguments: list[str]) -> None:
        main([*arguments, *small, *(small_fit if arguments[0] == "fit" else [])])

    configs = Path(__file__).parents[2] / "configs"
    result = run_demo(configs, tmp_path / "demo", 3, command)
    assert [point.step for point in result.sdft] == [1, 2]
    assert [point.step for point in result.sft] == [1, 2]
    assert result.sft[-1].drift > 0
    assert "**SDFT**, 2 steps" in (tmp_path / "demo" / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
