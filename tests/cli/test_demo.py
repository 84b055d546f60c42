"""The demo's table, its claims and its course, on made-up figures and on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from sdft_lightning.cli.demo import STORED, run_demo
from sdft_lightning.cli.demo_result import (
    DemoResult,
    Measured,
    Point,
    Run,
    Stored,
    findings,
    load_stored,
    nearest_runs,
    read_curve,
    store,
    table,
)
from sdft_lightning.errors import UserError

ROOT = Path(__file__).parents[2]
N = {"new": 64, "instructions": 170, "general": 400}


def measured(
    step: int, new: int, instructions: int, general: int, text: float, drift: float
) -> Measured:
    """A model with so many right items, always the first ones, and so many nats a text."""
    counts = {"new": new, "instructions": instructions, "general": general}
    items = {
        name: {str(i): float(i < counts[name]) for i in range(size)} for name, size in N.items()
    }
    items["text"] = {str(i): text - i % 3 for i in range(18)}
    return Measured(step, drift, 50.0 * 2 ** (-1000.0 - text), items)


BASE = measured(0, 0, 60, 260, -1000.0, 0.0)
GOOD = measured(48, 45, 59, 258, -1000.0, 0.1)
LOST = measured(24, 44, 30, 200, -1001.0, 1.2)


def result_of(main: Measured, sft: Measured | None = None) -> DemoResult:
    curve = [Point(24, 0.4, 0.2), Point(main.step, main.share("new").value, main.drift)]
    runs = {"sdft_retain": Run(curve, main, 9.0)}
    if sft is not None:
        points = [Point(sft.step, sft.share("new").value, sft.drift)]
        runs["sft"] = Run(points, sft, 3.0)
    return DemoResult(BASE, 0.8, runs, {"base": None, "sft": 42} if sft else {})


def test_each_claim_is_reported_as_shown_or_not() -> None:
    assert all(line.startswith("- shown") for line in findings(result_of(GOOD, LOST)))
    worse = {
        0: measured(48, 35, 59, 258, -1000.0, 0.1),
        1: measured(48, 40, 59, 258, -1000.0, 0.1),
        2: measured(48, 45, 59, 258, -1000.0, 0.16),
        3: measured(48, 45, 40, 258, -1000.0, 0.1),
        4: measured(48, 45, 59, 200, -1000.0, 0.1),
        5: measured(48, 45, 59, 258, -1001.0, 0.1),
    }
    for claim, main in worse.items():
        assert findings(result_of(main, LOST))[claim].startswith("- NOT shown"), claim
    kept = measured(24, 44, 60, 260, -1000.0, 1.2)  # drift alone is not two
    assert findings(result_of(GOOD, kept))[-1].startswith("- NOT shown")


@pytest.mark.parametrize(("text", "shown"), [(-1000.05, "NOT shown"), (-1000.02, "shown")])
def test_two_per_cent_of_perplexity_are_no_loss(text: float, shown: str) -> None:
    found = findings(result_of(measured(48, 45, 59, 258, text, 0.1), LOST))
    assert found[5] == f"- {shown}: SDFT with rows to retain: perplexity kept"


@pytest.mark.parametrize(
    ("main", "sft", "shown"),
    [
        (50, measured(24, 44, 46, 258, -1000.0, 1.2), "NOT shown"),  # both below base, and alike
        (59, measured(24, 44, 30, 258, -1000.0, 0.25), "NOT shown"),  # no threefold drift
        (59, measured(24, 44, 30, 258, -1000.0, 0.35), "shown"),
    ],
)
def test_sft_is_compared_with_sdft_and_not_with_the_base(
    main: int, sft: Measured, shown: str
) -> None:
    found = findings(result_of(measured(48, 45, main, 258, -1000.0, 0.1), sft))
    assert found[-1].startswith(f"- {shown}")


def test_a_difference_that_noise_explains_is_no_loss() -> None:
    few = measured(48, 45, 56, 256, -1000.0, 0.1)  # four items of 170: 2.4 points, p 0.125
    assert findings(result_of(few, LOST))[3].startswith("- shown")


def test_table_has_every_model_with_intervals_and_marks() -> None:
    text = table(result_of(GOOD, LOST))
    assert (
        "| base | 0 % (0 % to 6 %) | 35 % (29 % to 43 %) | 65 % (60 % to 70 %) | 50.0 | 0.00 nats |"
        in text
    )
    assert "| **SDFT with rows to retain, 48 steps** | 70 % (58 % to 80 %) ▲ | 35 % " in text
    (sft,) = [line for line in text.splitlines() if line.startswith("| SFT, 24 steps")]
    assert sft.count("▼") == 3
    assert "From stored runs, not measured now: base, SFT (seed 42)." in text


def test_stored_runs_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "demo" / "runs.json"
    result = result_of(GOOD, LOST)._replace(stored={})
    store(path, 43, result)
    assert load_stored(path) == Stored((BASE, 0.8), {43: result.runs})
    other = result._replace(base=LOST, stored={"base": None, "sdft_retain": 43})
    store(path, 42, other)
    held = load_stored(path)
    assert held == Stored((BASE, 0.8), {42: {"sft": result.runs["sft"]}, 43: result.runs})
    assert load_stored(tmp_path / "none.json") == Stored(None, {})


def test_of_each_method_the_seed_s_own_run_is_taken_or_the_first_that_there_is() -> None:
    mine, others = (Run([], each, 1.0) for each in (GOOD, LOST))
    stored = Stored(None, {42: {"sdft_retain": mine}, 44: {"sdft_retain": others, "sft": others}})
    assert nearest_runs(stored, 42) == {"sdft_retain": (42, mine), "sft": (44, others)}
    assert nearest_runs(stored, 44)["sdft_retain"] == (44, others)
    assert nearest_runs(stored, 7)["sdft_retain"] == (42, mine)


def test_only_validations_become_points(tmp_path: Path) -> None:
    records = [
        {"stage": "train", "step": 1, "perf/step_seconds": 2.0},
        {
            "stage": "validation",
            "step": 5,
            "val/task/front_desk/accuracy": 0.5,
            "val/drift/general": 0.1,
        },
        {"stage": "train", "step": 6, "perf/step_seconds": 1.0},
    ]
    text = "".join(json.dumps(each) + "\n" for each in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_curve(tmp_path) == ([Point(5, 0.5, 0.1)], 6, 2.0)


def demo_table() -> ModuleType:
    """The script that writes the README's table."""
    spec = importlib.util.spec_from_file_location("demo_table", ROOT / "scripts" / "demo_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_front_page_has_the_table_of_the_stored_runs() -> None:
    module = demo_table()
    table = module.table_of_seeds(load_stored(STORED))
    assert "**SDFT with rows to retain, 64 steps**" in table
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_table_of_several_seeds_has_means_each_seed_and_how_many_differ() -> None:
    module = demo_table()
    other = measured(48, 41, 40, 258, -1000.0, 0.12)
    seeds = {43: {"sdft_retain": Run([], GOOD, 9.0)}, 44: {"sdft_retain": Run([], other, 9.0)}}
    text = module.table_of_seeds(Stored((BASE, 0.8), seeds))
    assert "| 67 % (70, 64) ▲ 2/2 | 29 % (35, 24) ▼ 1/2 | " in text
    assert text.splitlines()[3].endswith("| 0.11 (0.10, 0.12) |")


def test_methods_that_there_are_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdft_lightning.cli.demo import main

    monkeypatch.setattr("sys.argv", ["demo", "--train=sdft_retain,dpo"])
    with pytest.raises(
        UserError, match=r"--train: got sdft_retain,dpo, allowed are base, sft, sft_"
    ):
        main()


def test_demo_runs_from_nothing_to_table_and_plot(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdft_lightning.cli import main

    monkeypatch.setattr("sys.argv", ["sdft"])
    small = [
        "--model.evaluation.max_new_tokens=3",
        "--data.eval_batch_size=8",
        "--trainer.limit_val_batches=1",
        "--data.lengths.teacher_prompt=4096",
    ]
    small_fit = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--data.batch_size=3"]
    tiny = f"--model.policy.name={model_folder}"

    examples = ROOT / "sdft_lightning" / "data" / "examples"
    few = {}
    for name, source in (("general", "front_desk/general"), ("kept", "kept/questions")):
        lines = (examples / f"{source}.jsonl").read_text("utf-8").splitlines(keepends=True)
        few[name] = tmp_path / f"{name}.jsonl"
        few[name].write_text("".join(lines[:8]), "utf-8")

    def command(arguments: list[str]) -> None:
        measures = any(each.endswith("demo_measures.yaml") for each in arguments)
        sets = few if measures else {"general": few["general"]}
        questions = [f"--data.held_out.{name}.source={path}" for name, path in sets.items()]
        more = [
            *questions,
            *small,
            *(small_fit if arguments[0] == "fit" else ["--data.benchmarks.limit=2"]),
        ]
        if any(each.endswith("demo_retain.yaml") for each in arguments):
            more.append("--data.retain_max_new_tokens=4")
        if not any(each.startswith("--model.policy.name") for each in arguments):
            more.append(tiny)
        main([*arguments, *more])

    configs = ROOT / "configs"
    root, stored = tmp_path / "demo", tmp_path / "stored.json"
    result = run_demo(configs, root, 3, ("sft_retain", "sdft_retain"), command, stored)
    assert list(result.runs) == ["sft_retain", "sdft_retain"]
    assert result.runs["sdft_retain"].measured.step == 2
    assert result.runs["sft_retain"].measured.step == 1  # both points know nothing, as SDFT
    assert result.stored == {}
    assert result.main.drift > 0
    assert "**SDFT with rows to retain, 2 steps**" in (root / "table.md").read_text("utf-8")
    assert (root / "demo.png").stat().st_size > 10_000
    for name in ("sft_retain", "sdft_retain"):
        assert "train/retained_kl" in (root / name / "metrics.jsonl").read_text("utf-8")
    # A second demo reads what the first has stored.
    store(stored, 3, result)
    again = run_demo(configs, tmp_path / "again", 3, (), command, stored)
    assert again == result._replace(stored={"base": None, "sft_retain": 3, "sdft_retain": 3})
    # Of a seed that has none, those of the first that has.
    other = run_demo(configs, tmp_path / "other", 4, (), command, stored)
    assert other == again
