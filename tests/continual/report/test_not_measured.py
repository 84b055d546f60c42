"""What was not measured, or stands in no mean, is told or left out; it is never averaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.report import write_report
from sdft_lightning.continual.report.comparisons import compare
from sdft_lightning.continual.report.content import pooled_table
from sdft_lightning.continual.report.records import parse_measure, parse_record, read_records
from sdft_lightning.continual.report.results import gather
from sdft_lightning.continual.report.summary import summarise
from sdft_lightning.errors import UserError

Raw = dict[str, Any]
Write = Callable[..., Path]
NOTHING_JUDGED = {"accuracy": None, "low": None, "high": None, "n": 0, "items": {}}
LEAVES = {f"mmlu_{i}": {"acc": 0.9, "acc_stderr": 0.1, "in_mean": False} for i in range(57)}
BENCHMARKS = {
    "ifeval": {
        "prompt_level_strict_acc": 0.4,
        "prompt_level_strict_acc_stderr": 0.02,
        "inst_level_loose_acc": 0.7,
        "inst_level_loose_acc_stderr": 0.02,
        "metric": "inst_level_loose_acc",
    },
    "mmlu": {"acc": 0.5, "acc_stderr": 0.01, "metric": "acc"},
    **LEAVES,
}


def test_benchmarks_count_by_the_metric_of_the_plan_and_groups_once(by_hand: list[Raw]) -> None:
    for record in by_hand:
        record["capabilities"] = BENCHMARKS
    results = gather([parse_record(record, "line 1") for record in by_hand])
    _, method = summarise(results)
    assert method.retained is not None
    assert method.retained.estimate.value == pytest.approx((0.7 + 0.5) / 2)
    shown = {column.name: column.metric for column in method.columns}
    assert shown["ifeval"] == "inst_level_loose_acc"
    assert shown["mmlu_3"] == "acc"  # the matrix has them all


@pytest.mark.parametrize(
    "raw",
    [NOTHING_JUDGED, {"accuracy": 0.0, "n": 0}, {"word_perplexity": None}],
    ids=["no verdict", "no items", "no number"],
)
def test_a_set_without_any_verdict_is_not_measured(
    raw: Raw, by_hand: list[Raw], write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse_measure(raw, "here") is None
    by_hand[2]["capabilities"]["general"] = raw
    by_hand[2]["drift"] = {"general": None}
    by_hand[2]["curve"] = [{"step": 4, "drift/general": None}]
    folder = write_report([write(by_hand)], tmp_path / "report")
    assert "capabilities.general is missing in 1 of 5 records" in capsys.readouterr().out
    assert (folder / "report.json").is_file()


def test_a_metric_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match=r"here: metric must be one of acc; got 'f1'"):
        parse_measure({"acc": 0.5, "metric": "f1"}, "here")


def test_texts_are_compared_by_their_log_likelihoods_and_told_in_nats(
    by_hand: list[Raw],
) -> None:
    for record in by_hand:
        shift = 0.0 if record["method"] == "base" else 2.5
        items = {str(i): -30.25 - i - shift for i in range(10)}
        text = {"word_perplexity": 53.0 + shift, "items": items, "mean_of_items": False}
        record["capabilities"] = {"kept_text": text}
    results = gather([parse_record(record, "line 1") for record in by_hand])
    assert not [each for each in results.problems if each.kind == "figures disagree"]
    comparisons = compare(results)
    (texts,) = [each for each in comparisons.pooled if each.name == "kept_text"]
    assert texts.difference == -2.5
    assert texts.p == pytest.approx(2 / 2**10)  # all ten fell
    table = pooled_table(comparisons)
    (row,) = [each for each in table.rows if each[0] == "kept_text"]
    assert row[2] == "−2.50 nats"
    (points,) = [each for each in table.rows if each[0] == "a"]
    assert "nats" not in points[2]
    assert "“nats”" in table.note


@pytest.mark.parametrize("also_good", [False, True])
def test_a_plan_in_which_everything_has_failed_makes_a_report_that_says_so(
    also_good: bool,
    by_hand: list[Raw],
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failed = {**by_hand[1], "status": "failed", "error": "out of memory", "plan": "f" * 64}
    found = [*by_hand, failed] if also_good else [failed]
    folder = write_report([write(found)], tmp_path / "report")
    shown = capsys.readouterr().out
    assert "out of memory" in shown
    assert "the plan has one" not in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "report.json").is_file()
    assert len(read_records([write(found)])[0]) == len(found)
