"""What a dry run tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.overview import overview
from sdft_lightning.continual.plan_file import build_plan
from sdft_lightning.continual.units import Shard

Options = dict[str, Any]


def test_times_come_from_finished_runs_of_the_same_method_and_none_is_invented(
    plan_options: Options, drive: Any
) -> None:
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
        for line in overview(build_plan(plan_options), Shard(), records).splitlines()
        if (cells := line.split())
    }
    assert lines["base"] == "nothing done 3"
    assert lines["sdft/seed1/1_ferry"] == "4 updates done 3"
    # 2 seconds for 4 updates: 5 for 10, and 1 for the evaluation.
    assert lines["sdft/seed1/2_museum"] == "10 updates failed, to do again about 6"
    assert lines["sdft/seed2/1_ferry"] == "4 updates to do about 3"
    assert lines["sft/seed2/2_museum"] == "10 updates to do"
    # sdft: 6 of seed 1, 3 + 6 of seed 2; sft: four runs of which nothing is known.
    assert lines["7"] == (
        "runs to do, 3 of them about 15s (as their method took); how long the other 4 take is not "
        "known: none of their method is finished."
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
    assert "5 runs to do; how long 5 take is not known" in out
