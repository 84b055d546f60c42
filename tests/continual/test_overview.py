"""What a dry run tells."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.overview import Machine, RoughTime, SetSize, overview
from sdft_lightning.continual.plan import Shard, chains_of
from sdft_lightning.continual.plan_file import build_plan

Options = dict[str, Any]


def test_times_come_from_finished_runs_of_the_same_method_and_others_are_told_apart(
    plan_options: Options, drive: Any
) -> None:
    def guess(unit: Any) -> float | None:
        return None if unit.stage.name == "ferry" else 20.0

    plan_options["stages"][1]["budget"] = {"updates": 10}
    drive.runs.fail = lambda command, options: options["run"]["name"] == "2_museum"
    drive({**plan_options, "seeds": [1], "methods": plan_options["methods"]})
    records = drive.records(plan_options)
    for record in records.values():
        if record["status"] == "finished":
            record["seconds"] = {"fit": 2.0, "evaluate": 1.0}
    del records["sft", 1, 1]
    lines = {
        cells[0]: " ".join(cells[1:])
        for line in overview(build_plan(plan_options), Shard(), records, guess).splitlines()
        if (cells := line.split())
    }
    assert lines["base"] == "nothing done 3"
    assert lines["sdft/seed1/1_ferry"] == "4 updates done 3"
    # 2 seconds for 4 updates: 5 for 10, and 1 for the evaluation.
    assert lines["sdft/seed1/2_museum"] == "10 updates failed, to do again about 6"
    assert lines["sdft/seed2/1_ferry"] == "4 updates to do about 3"
    assert lines["sft/seed2/1_ferry"] == "4 updates to do"
    assert lines["sft/seed2/2_museum"] == "10 updates to do roughly 20"
    # sdft: 6 of seed 1, 3 + 6 of seed 2; sft: four runs of which none is finished.
    assert lines["7"] == (
        "runs to do; 3 of them about 15s (as their method took); 2 roughly 40s (within a factor of "
        "three, from the model's size, the rows and a matrix product on this machine); 2 of which "
        "nothing is known, as their model or rows are not here."
    )


def test_overview_of_a_share_shows_that_share(plan_options: Options) -> None:
    text = overview(build_plan(plan_options), Shard(2, 4), {})
    assert "sft/seed1/1_ferry" in text
    assert "sdft" not in text
    assert "base" not in text


def test_finished_plan_says_so(plan_options: Options, drive: Any) -> None:
    drive(plan_options)
    text = overview(build_plan(plan_options), Shard(), drive.records(plan_options))
    assert text.endswith("All is done.")


def test_dry_run_writes_nothing_and_shows_every_run(
    plan_options: Options,
    tmp_path: Path,
    run_cli: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(plan_options))
    before = sorted(tmp_path.rglob("*"))
    run_cli("continual", f"--config={path}", "--dry_run", "--seeds=[5]", "--shard=1/1")
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert "sft/seed5/2_museum" in out
    assert re.search(r"5 runs to do; 5 roughly \d+s \(within", out)


ROWS = SetSize(rows=100, prompt=30.0, demonstration=10.0, context=60.0)


@pytest.fixture
def rough(plan_options: Options, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Seconds of each method's first stage, on a machine of round figures."""

    def times(**changes: Any) -> dict[str, float]:
        plan_options.update(changes)
        plan_options["trainer"].pop("val_check_interval")
        found = RoughTime(build_plan(plan_options))
        monkeypatch.setattr(found, "_size", lambda source, columns: ROWS)
        found.parameters, found.machine = 1000, Machine(operations=1e6, bytes_read=1e6)
        evaluation = found.seconds(None)
        assert evaluation is not None
        stages = {chain[0].method: found.seconds(chain[0]) for chain in chains_of(found.plan)}
        return {
            "evaluate": evaluation,
            **{name: (seconds or 0.0) - evaluation for name, seconds in stages.items()},
        }

    return times


def test_rough_time_by_hand(rough: Callable[..., Any]) -> None:
    found = rough()
    # A forward pass takes 2 ms a token; reading 1000 weights of 4 bytes takes 4 ms.
    # Questions: 3 sets of 100; 25 batches of 4, 8 new tokens each at max(4, 8) ms; the drift twice.
    assert found["evaluate"] == pytest.approx(3 * (6.0 + 25 * 8 * 0.008) + 2 * 6.0)
    # 4 updates of 3 rows: 40 tokens each, forward and backward.
    assert found["sft"] == pytest.approx(4 * 3 * 0.002 * 3 * 40)
    # 4 updates of 2 rows: prompts, 8 new tokens, the student three times, the teacher once.
    step = 2 * 30 * 0.002 + 8 * 0.004 + 3 * 2 * 38 * 0.002 + 2 * 108 * 0.002
    assert found["sdft"] == pytest.approx(4 * step)


def test_rough_time_of_a_budget_of_tokens(rough: Callable[..., Any]) -> None:
    found = rough(budget={"tokens": 100})
    assert found["sft"] == pytest.approx(4 * 3 * 0.002 * 3 * 40)  # 30 tokens an update


def test_rough_time_counts_the_weights_and_measures_the_machine(
    plan_options: Options, model: Any
) -> None:
    rough = RoughTime(build_plan(plan_options))
    assert rough.parameters == model.num_parameters()
    assert min(rough.machine) > 1e6
    seconds = rough.seconds(None)
    assert seconds is not None
    assert seconds > 0


def test_rough_time_is_none_where_the_model_is_not_here(plan_options: Options) -> None:
    plan_options["model"]["init_args"]["policy"]["name"] = "./absent/model"
    assert RoughTime(build_plan(plan_options)).seconds(None) is None


@pytest.mark.parametrize(
    "change",
    [{"columns": None}, {"test": None}, {"eval_batch_size": 0}],
    ids=lambda each: str(each),
)
def test_odd_options_end_no_plan_for_a_guess(change: Options, plan_options: Options) -> None:
    for stage in plan_options["stages"]:
        stage["data"].update(change)
    assert RoughTime(build_plan(plan_options)).seconds(None) is None
