"""What is missing, failed, double, contradicting or mixed is said, and never averaged away."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.report.records import read_records
from sdft_lightning.continual.report.results import Results, gather
from sdft_lightning.continual.report.summary import Summary, summarise
from sdft_lightning.errors import UserError

Raw = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture
def gathered(write: Write) -> Callable[[list[Raw]], Results]:
    return lambda found: gather(*read_records([write(found)]))


Gathered = Callable[[list[Raw]], Results]


def kinds(results: Results) -> list[str]:
    return [problem.kind for problem in results.problems]


def find(records: list[Raw], method: str, seed: int, stage: int) -> Raw:
    wanted = (method, seed, stage)
    return next(r for r in records if (r["method"], r["seed"], r["stage"]) == wanted)


def summary_of(results: Results, label: str) -> Summary:
    return next(each for each in summarise(results) if each.label == label)


def test_complete_results_have_no_problem(records: list[Raw], gathered: Gathered) -> None:
    results = gathered(records)
    assert results.problems == ()
    assert [method.label for method in results.methods] == ["sdft", "sft"]
    assert all(method.complete_seeds() == (42, 43, 44) for method in results.methods)


def test_a_missing_run_is_named_and_its_seed_enters_no_final_mean(
    records: list[Raw], gathered: Gathered
) -> None:
    records.remove(find(records, "sft", 44, 3))
    results = gathered(records)
    assert kinds(results) == ["missing run"]
    assert "sft, seed 44: no result of stage 3 (garden)" in results.problems[0].text
    summary = summary_of(results, "sft")
    assert (summary.complete, summary.expected) == ((42, 43), 3)
    assert summary.new is not None
    finals = [find(records, "sft", seed, 3)["tasks"] for seed in (42, 43)]
    values = [sum(task["accuracy"] for task in tasks.values()) / 3 for tasks in finals]
    assert summary.new.estimate.value == pytest.approx(sum(values) / 2)
    assert summary.new.seeds == 2
    assert (summary.matrix[3, 0].seeds, summary.matrix[3, 0].expected) == (2, 3)
    assert summary.matrix[2, 0].seeds == 3


def test_a_whole_seed_that_is_missing_is_known_from_the_other_method(
    records: list[Raw], gathered: Gathered
) -> None:
    left = [r for r in records if (r["method"], r["seed"]) != ("sdft", 43)]
    results = gathered(left)
    assert kinds(results) == ["missing run"]
    assert "stage 1 (front_desk), 2 (kitchen), 3 (garden)" in results.problems[0].text


def test_a_failed_run_has_no_figures_even_if_it_recorded_some(
    records: list[Raw], gathered: Gathered
) -> None:
    find(records, "sdft", 42, 3).update(status="failed", error="CUDA out of memory")
    results = gathered(records)
    assert kinds(results) == ["failed run"]
    text = results.problems[0].text
    assert "sdft, seed 42, stage 3 (garden) failed: CUDA out of memory" in text
    assert summary_of(results, "sdft").complete == (43, 44)


def test_a_retried_run_counts_once_it_finished(records: list[Raw], gathered: Gathered) -> None:
    failed = {**find(records, "sdft", 42, 3), "status": "failed", "error": "killed"}
    results = gathered([*records[:3], failed, *records[3:]])
    assert kinds(results) == ["retried run"]
    assert results.problems[0].note
    assert summary_of(results, "sdft").complete == (42, 43, 44)


def test_identical_duplicates_are_counted_once(records: list[Raw], gathered: Gathered) -> None:
    plain = summary_of(gathered(records), "sdft")
    again = copy.deepcopy(find(records, "sdft", 42, 3))
    again.update(seconds={"fit": 99.0}, run="elsewhere")  # where and how long do not matter
    results = gathered([*records, again, records[0]])
    assert kinds(results) == ["duplicates"]
    assert results.problems[0].note
    assert "2 records" in results.problems[0].text
    assert "base; sdft, seed 42, stage 3 (garden)" in results.problems[0].text
    assert summary_of(results, "sdft") == plain


def test_contradicting_duplicates_are_both_left_out(records: list[Raw], gathered: Gathered) -> None:
    other = copy.deepcopy(find(records, "sdft", 42, 3))
    other["drift"]["general"] += 0.1
    results = gathered([*records, other])
    assert kinds(results) == ["contradiction", "missing run"]
    text = results.problems[0].text
    assert "sdft, seed 42, stage 3 (garden) has 2 records" in text
    assert "line 4; " in text
    assert f"line {len(records) + 1})" in text
    assert summary_of(results, "sdft").complete == (43, 44)


def test_mixed_plans_are_never_pooled(records: list[Raw], gathered: Gathered) -> None:
    second = copy.deepcopy(records)
    for record in second:
        record["plan"] = "0ther" * 10
    results = gathered([*records, *second])
    assert kinds(results) == ["mixed plans"]
    assert "2 plans (5eed5eed, 0ther0th)" in results.problems[0].text
    labels = [method.label for method in results.methods]
    assert labels[:2] == ["sdft (plan 5eed5eed)", "sft (plan 5eed5eed)"]
    assert labels[2:] == ["sdft (plan 0ther0th)", "sft (plan 0ther0th)"]
    assert all(len(method.seeds) == 3 for method in results.methods)


def test_missing_runs_of_mixed_plans_are_found(records: list[Raw], gathered: Gathered) -> None:
    second = [{**record, "plan": "other"} for record in records if record["seed"] in (None, 7, 42)]
    failed = find(second, "sft", 42, 3)
    failed |= {"status": "failed", "error": "x"}
    second.remove(find(second, "sdft", 42, 2))
    assert kinds(gathered([*records, *second])) == ["mixed plans", "failed run", "missing run"]


def test_no_base_record(records: list[Raw], gathered: Gathered) -> None:
    results = gathered(records[1:])
    assert kinds(results) == ["no base"]
    summary = summary_of(results, "sdft")
    assert summary.retained_change is None
    assert summary.mean_score("forward_transfer") is None
    assert summary.mean_score("backward_transfer") is not None


def test_stages_that_differ_within_a_plan_are_an_error(
    records: list[Raw], gathered: Gathered
) -> None:
    records[4].update(stages=["front_desk", "garden", "kitchen"], stage_name="front_desk")
    with pytest.raises(UserError, match="line 5: stages are front_desk, garden, kitchen"):
        gathered(records)


def test_an_ability_that_one_run_lacks_is_no_mean_of_the_others(
    records: list[Raw], gathered: Gathered
) -> None:
    del find(records, "sdft", 43, 3)["capabilities"]["hellaswag"]
    results = gathered(records)
    assert kinds(results) == ["not measured"]
    assert "capabilities.hellaswag is missing in 1 of 19 records" in results.problems[0].text
    summary = summary_of(results, "sdft")
    assert [point.retained is None for point in summary.points] == [False, True, False]
    assert summary.retained is not None
    assert summary.retained.seeds == 2


def test_figures_that_do_not_fit_are_named(records: list[Raw], gathered: Gathered) -> None:
    run = find(records, "sdft", 43, 3)
    run["capabilities"]["hellaswag"] = {"acc_norm": 0.4}
    general = run["capabilities"]["general"]
    general["accuracy"] = (general["low"] + general["high"]) / 2
    general["items"]["one-more"] = 1.0
    results = gathered(records)
    assert kinds(results) == ["other items", "figures disagree", "mixed metrics"]
    assert "measured on 2 different sets of items" in results.problems[0].text
    assert "measured as acc and as acc_norm" in results.problems[2].text


def test_perplexity_is_shown_and_enters_no_mean(records: list[Raw], gathered: Gathered) -> None:
    for number, record in enumerate(records):
        record["capabilities"]["wikitext"] = {"word_perplexity": 0.9 + number}
    results = gathered(records)
    summary = summary_of(results, "sdft")
    column = next(c for c in summary.columns if c.name == "wikitext")
    assert not column.fraction
    capabilities = find(records, "sdft", 42, 3)["capabilities"]
    expected = (capabilities["general"]["accuracy"] + capabilities["hellaswag"]["acc"]) / 2
    point = summary.points[0].retained
    assert point is not None
    assert point.value == pytest.approx(expected)


def test_only_the_base(records: list[Raw], gathered: Gathered) -> None:
    results = gathered(records[:1])
    (summary,) = summarise(results)
    assert summary.is_base()
    assert summary.new is not None
