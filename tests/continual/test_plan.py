"""What a plan may hold, and the runs that it comes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.checks import check_plan
from sdft_lightning.continual.plan import (
    ContinualPlan,
    Shard,
    Unit,
    chains_of,
    parse_shard,
    share_of,
)
from sdft_lightning.continual.plan_file import (
    build_plan,
    evaluation_options,
    fit_options,
    merged,
    read_options,
)
from sdft_lightning.errors import UserError

Options = dict[str, Any]


def units_of(plan: ContinualPlan) -> list[Unit]:
    return [unit for chain in chains_of(plan) for unit in chain]


def test_plan_comes_to_methods_times_stages_times_seeds_with_a_folder_each(
    plan: ContinualPlan, tmp_path: Path
) -> None:
    assert [unit.run for unit in units_of(plan)] == [
        f"{method}/seed{seed}/{stage}"
        for seed in (1, 2)
        for method in ("sdft", "sft")
        for stage in ("1_ferry", "2_museum")
    ]
    assert units_of(plan)[-1].folder == tmp_path / "runs/plan/sft/seed2/2_museum"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_shares_are_disjoint_and_together_the_whole(plan: ContinualPlan, count: int) -> None:
    chains = chains_of(plan)
    shares = [share_of(chains, Shard(number, count)) for number in range(1, count + 1)]
    assert sorted(chain[0].run for share in shares for chain in share) == sorted(
        chain[0].run for chain in chains
    )
    assert shares[0][0] == chains[0]


def test_shard_is_read_as_i_of_n_and_names_its_own_file() -> None:
    assert parse_shard("2/8").results_name == "results-shard2of8.jsonl"
    assert parse_shard(None).results_name == "results.jsonl"


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/2/3", "-1/2"])
def test_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="shard: got"):
        parse_shard(text)


def test_options_of_a_method_stand_over_the_stages_and_those_over_the_plans(
    plan_options: Options,
) -> None:
    plan_options["data"]["batch_size"] = 7
    plan_options["stages"][1]["data"] |= {"batch_size": 5, "prompts": {"style": "context"}}
    sdft, sft = (chain[1] for chain in chains_of(build_plan(plan_options))[:2])
    plan = build_plan(plan_options)
    assert fit_options(plan, sdft, "m")["data"]["batch_size"] == 5
    assert fit_options(plan, sft, "m")["data"]["batch_size"] == 3
    assert fit_options(plan, sft, "m")["data"]["prompts"] == {"style": "context"}


def test_another_class_does_not_inherit_the_arguments_of_the_one_it_replaces() -> None:
    before = {"teacher": {"class_path": "EMATeacher", "init_args": {"update_rate": 0.1}}, "a": 1}
    assert merged(before, {"teacher": {"class_path": "FrozenTeacher"}}) == {
        "teacher": {"class_path": "FrozenTeacher"},
        "a": 1,
    }
    same = merged(before, {"teacher": {"class_path": "EMATeacher", "init_args": {"every": 2}}})
    assert same["teacher"]["init_args"] == {"update_rate": 0.1, "every": 2}


def test_stage_starts_from_the_model_before_it_and_measures_kl_from_the_original_base(
    plan_options: Options, model_folder: Path
) -> None:
    plan_options["model"]["init_args"]["policy"]["revision"] = "r1"
    plan = build_plan(plan_options)
    first, second = chains_of(plan)[0]
    for unit, given, name, revision in (
        (first, None, str(model_folder), "r1"),
        (second, "exported", "exported", None),  # a revision of the base is none of the export
    ):
        options = fit_options(plan, unit, given)
        assert options["model"]["init_args"]["policy"]["name"] == name
        assert options["model"]["init_args"]["policy"]["revision"] == revision
        (drift,) = (c for c in options["trainer"]["callbacks"] if "Drift" in c["class_path"])
        assert drift["init_args"]["model_name"] == str(model_folder)
        assert drift["init_args"]["revision"] == "r1"
    tested = evaluation_options(plan, second.folder, "exported")
    assert tested["trainer"]["callbacks"][0]["init_args"]["model_name"] == str(model_folder)


def test_evaluation_asks_every_stage_and_held_out_set_whatever_the_method(
    plan_options: Options,
) -> None:
    plan_options["stages"][0]["data"]["lengths"] = {"prompt": 77}
    plan_options["benchmarks"] = {"tasks": ["hellaswag"], "limit": 3}
    options = evaluation_options(build_plan(plan_options), Path("runs/x"), None)
    assert list(options["data"]["held_out"]) == ["ferry", "museum", "general"]
    assert options["data"]["held_out"]["ferry"]["lengths"] == {"prompt": 77}
    assert "lengths" not in options["data"]["held_out"]["museum"]
    assert options["data"]["benchmarks"] == {"tasks": ["hellaswag"], "limit": 3}
    assert "optimizer" not in options["model"]["init_args"]
    assert options["model"]["init_args"]["evaluation"] == {"max_new_tokens": 8}


def test_matched_budgets_reach_every_method_alike(plan_options: Options) -> None:
    plan_options["stages"][1]["budget"] = {"tokens": 90}
    plan = build_plan(plan_options)
    for chain in chains_of(plan):
        first, second = (fit_options(plan, unit, "m")["trainer"] for unit in chain)
        tokens = [
            callback["init_args"]["tokens"]
            for trainer in (first, second)
            for callback in trainer["callbacks"]
            if callback["class_path"].endswith("TokenBudget")
        ]
        assert (first["max_steps"], second["max_steps"], tokens) == (4, -1, [None, 90])


def change(options: Options, place: str, value: Any) -> Options:
    """Set an option at `a.b.0`."""
    *parts, last = place.split(".")
    node: Any = options
    for part in parts:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = value
    return options


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("budget", {}, ["budget", "one of them"]),
        ("budget", {"updates": 1, "tokens": 1}, ["budget", "one of them"]),
        ("budget", {"updates": 0}, ["budget", "1 or more"]),
        ("budget", {"steps": 3}, ["budget.steps", "updates, tokens"]),
        ("budget", {"updates": True}, ["budget.updates", "a whole number"]),
        ("select", "first", ["select", "last, best"]),
        ("processes", "many", ["processes", "own, same"]),
        ("trainer.devices", "auto", ["processes", "trainer.devices", "'auto'"]),
        ("trainer.max_steps", 3, ["trainer.max_steps", "budget"]),
        ("methods.sft.trainer", {"max_epochs": 3}, ["methods.sft.trainer.max_epochs", "budget"]),
        ("stages.0.data.held_out", {}, ["stages.ferry.data.held_out", "the plan's own"]),
        ("data.name", "x", ["data.name", "name of the stage"]),
        ("trainer.callbacks", [{"class_path": "DriftMonitor"}], ["DriftMonitor", "`drift`"]),
        ("drift", ["generl"], ["drift", "'generl'", "general"]),
        ("seeds", [], ["seeds", "none"]),
        ("seeds", [1, 1], ["seeds", "1 stands twice"]),
        ("seeds", ["a"], ["seeds", "whole numbers"]),
        ("seeds", 42, ["seeds", "a list"]),
        ("stages.0.name", "museum", ["stages", "museum stands twice"]),
        ("stages.0.name", "general", ["held_out", "general stands twice"]),
        ("stages.0.name", "a/b", ["stages", "'a/b'"]),
        ("stages", [], ["stages", "none"]),
        ("methods", {"base": {"model": {}}}, ["methods", "'base'"]),
        ("methods", {"x": {}}, ["methods.x.model", "needed"]),
        ("resume_every", 0, ["resume_every", "got 0"]),
        ("colour", 1, ["colour", "no such option", "seeds"]),
        ("held_out.general.column", {}, ["held_out.general.column", "columns, prompts"]),
    ],
)
def test_plan_that_cannot_be_right_is_refused_by_the_name_of_the_option(
    place: str, value: Any, words: list[str], plan_options: Options
) -> None:
    with pytest.raises(UserError) as error:
        build_plan(change(plan_options, place, value))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("data.grader", None, ["stages.ferry.data.grader"]),
        ("stages.1.data.test", None, ["stages.museum.data.test"]),
        ("stages.1.data.test", "nowhere.jsonl", ["stages.museum.data.test", "nowhere.jsonl"]),
        ("held_out.general.source", "nowhere", ["held_out.general.source", "nowhere"]),
        ("budget", {"tokens": 9}, ["methods.sdft, stages.ferry", "budget.tokens", "constant"]),
        (
            "methods.sft.model.init_args",
            # Its adapters have no model to be added to.
            {"policy": {"lora": {"r": 4}, "quantization": "nf4"}},
            ["methods.sft, stages.ferry", "quantization", "nf4", "whole model"],
        ),
    ],
)
def test_plan_whose_runs_cannot_work_is_refused_before_the_first(
    place: str, value: Any, words: list[str], plan_options: Options
) -> None:
    with pytest.raises(UserError) as error:
        check_plan(build_plan(change(plan_options, place, value)), lambda command, options: "")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_best_needs_validation_questions_and_last_does_not(plan_options: Options) -> None:
    del plan_options["stages"][1]["data"]["validation"]
    check_plan(build_plan(plan_options), lambda command, options: "")
    plan_options["select"] = "best"
    with pytest.raises(UserError, match=r"stages\.museum\.data\.validation"):
        check_plan(build_plan(plan_options), lambda command, options: "")


def test_options_that_a_run_would_refuse_are_refused_for_all_stages_at_once(
    plan: ContinualPlan,
) -> None:
    def parse(command: str, options: str) -> str:
        return "no such option" if '"name": "2_museum"' in options and "SFT" in options else ""

    with pytest.raises(UserError, match=r"methods\.sft, stages\.museum: no such option"):
        check_plan(plan, parse)


def test_options_of_the_command_line_stand_over_files_and_later_files_over_earlier(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.yaml").write_text("budget: {updates: 3}\nname: a\nseeds: [1]\n")
    (tmp_path / "b.yaml").write_text("name: b\n")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    found = read_options(files, ["--budget.updates=8", "--seeds=[5, 6]"])
    assert found == {"budget": {"updates": 8}, "name": "b", "seeds": [5, 6]}


@pytest.mark.parametrize("override", ["updates=3", "--updates", "oops"])
def test_option_that_is_not_understood_is_refused(override: str) -> None:
    with pytest.raises(UserError, match="not understood"):
        read_options([], [override])


Parse = Callable[[str, str], str]


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("methods.sft.model.init_args", {"learning": 1}, ["methods.sft, stages.ferry", "learning"]),
        ("data.batchsize", 3, ["methods.sdft, stages.ferry", "batchsize"]),
        ("data.eval_batch_size", "many", ["eval_batch_size", "many"]),
    ],
)
def test_parser_of_the_runs_finds_misspelt_options_before_anything_runs(
    place: str,
    value: Any,
    words: list[str],
    plan_options: Options,
    run_cli: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import json

    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(change(plan_options, place, value)))
    with pytest.raises(SystemExit) as stop:
        run_cli("continual", f"--config={path}")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("strategy", ["fsdp2", {"class_path": "FSDP2Strategy"}])
def test_best_weights_of_a_model_that_is_spread_are_refused(
    strategy: Any, plan_options: Options
) -> None:
    options = {**plan_options, "select": "best"}
    options["trainer"] = {**options["trainer"], "strategy": strategy}
    with pytest.raises(UserError, match="select: best puts the best weights into a whole one"):
        check_plan(build_plan(options), lambda command, text: "")
    check_plan(build_plan({**options, "select": "last"}), lambda command, text: "")


def test_an_option_of_one_stage_is_given_by_the_stages_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "stages:\n- {name: one, data: {train: a, grader: exact}}\n- {name: two, data: {train: b}}\n"
    )
    given = ["--stages.two.data.train=c", "--stages.one.budget.updates=8"]
    stages = read_options([str(path)], given)["stages"]
    assert stages == [
        {"name": "one", "data": {"train": "a", "grader": "exact"}, "budget": {"updates": 8}},
        {"name": "two", "data": {"train": "c"}},
    ]
    with pytest.raises(UserError, match=r"stages\.three: there is no such stage.* one, two"):
        read_options([str(path)], ["--stages.three.data.train=c"])
    with pytest.raises(UserError, match=r"stages\.one: there is no such stage"):
        read_options([str(path)], ["--stages.one=c"])
    whole = read_options([str(path)], ["--stages=[{name: four}]"])
    assert whole["stages"] == [{"name": "four"}]
