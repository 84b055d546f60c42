"""A folder belongs to one plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.checks import canonical_plan, claim_folder, plan_hash
from sdft_lightning.continual.plan_file import build_plan
from sdft_lightning.errors import UserError

Options = dict[str, Any]


def claim(options: Options, write: bool = True) -> str:
    plan = build_plan(options)
    canonical = canonical_plan(plan)
    claim_folder(Path(plan.root) / plan.name, canonical, write)
    return plan_hash(canonical)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("budget", "updates", 5, ["budget.updates (there 4, here 5)"]),
        ("data", "batch_size", 4, ["data.batch_size (there 2, here 4)"]),
        ("data", "num_workers", 1, ["data.num_workers (there absent, here 1)"]),
        ("methods", "dft", {"model": {}}, ["methods.dft", "absent"]),
    ],
)
def test_changed_plan_is_refused_and_the_difference_named(
    section: str, key: str, value: Any, words: list[str], plan_options: Options
) -> None:
    first = claim(plan_options)
    plan_options[section][key] = value
    with pytest.raises(UserError) as error:
        claim(plan_options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert plan_hash(canonical_plan(build_plan(plan_options))) != first


def test_changed_content_of_a_data_file_is_a_changed_plan(plan_options: Options) -> None:
    claim(plan_options)
    path = Path(plan_options["stages"][1]["data"]["train"])
    path.write_text(path.read_text().replace("Q3", "Q33"))
    with pytest.raises(UserError) as error:
        claim(plan_options)
    assert f"files.{path}" in str(error.value)


def test_seeds_and_where_it_runs_make_no_other_plan(plan_options: Options) -> None:
    first = claim(plan_options)
    changed = {"seeds": [9], "resume_every": 7, "keep_checkpoints": True, "processes": "own"}
    assert claim({**plan_options, **changed}) == first


def test_folder_of_something_else_is_refused_and_left_alone(
    plan_options: Options, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "plan"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("a run")
    with pytest.raises(UserError, match="no plan's"):
        claim(plan_options)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_looking_on_claims_nothing(plan_options: Options, tmp_path: Path) -> None:
    claim(plan_options, write=False)
    assert not (tmp_path / "runs").exists()
