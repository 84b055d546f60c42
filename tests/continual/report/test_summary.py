"""Means, matrices, curves and comparisons from records, with values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.report.comparisons import compare
from sdft_lightning.continual.report.plots import learning_curves, stage_starts
from sdft_lightning.continual.report.records import read_records
from sdft_lightning.continual.report.results import Results, gather
from sdft_lightning.continual.report.summary import summarise
from sdft_lightning.graders import wilson_interval

Raw = dict[str, Any]


@pytest.fixture
def gathered(write: Callable[..., Path]) -> Callable[[list[Raw]], Results]:
    return lambda found: gather(*read_records([write(found)]))


Gathered = Callable[[list[Raw]], Results]


def test_summary_by_hand(by_hand: list[Raw], gathered: Gathered) -> None:
    base, sdft = summarise(gathered(by_hand))
    assert base.is_base()
    assert base.new is not None
    assert base.new.estimate.value == pytest.approx(0.15)
    assert sdft.new is not None
    assert sdft.new.estimate.value == pytest.approx((0.75 + 0.65) / 2)
    assert sdft.new.spread == pytest.approx(0.1 / 2**0.5)
    assert sdft.retained is not None
    assert sdft.retained.estimate.value == pytest.approx(0.65)
    ends = [wilson_interval(right, 10) for right in (6, 7)]
    assert sdft.retained.estimate.low == pytest.approx((ends[0][0] + ends[1][0]) / 2)
    assert sdft.retained_change == pytest.approx(0.65 - 0.8)


def test_matrix_and_scores_by_hand(by_hand: list[Raw], gathered: Gathered) -> None:
    _, sdft = summarise(gathered(by_hand))
    assert [column.name for column in sdft.columns] == ["a", "b", "general"]
    values = [[sdft.matrix[stage, i].value for i in range(3)] for stage in range(3)]
    assert values[0] == [0.1, 0.2, 0.8]
    assert values[1] == pytest.approx([0.7, 0.25, 0.75])
    assert values[2] == pytest.approx([0.6, 0.8, 0.65])
    assert sdft.scores[1] == pytest.approx((0.75, 0.2, -0.2, 0.1))
    assert sdft.scores[2] == pytest.approx((0.65, 0.0, 0.0, 0.0))
    assert sdft.mean_score("backward_transfer") == pytest.approx((-0.1, 0.02**0.5))
    assert sdft.mean_score("forward_transfer") == pytest.approx((0.05, 0.005**0.5))


def test_comparison_by_hand(by_hand: list[Raw], gathered: Gathered) -> None:
    found = compare(gathered(by_hand))
    assert [(c.kind, c.name, c.first, c.second) for c in found.pooled] == [
        ("tasks", "a", "sdft", "base"),
        ("tasks", "b", "sdft", "base"),
        ("capabilities", "general", "sdft", "base"),
    ]
    a, b, general = found.pooled
    assert (a.items, a.seeds, a.expected) == (10, (1, 2), 2)
    # Both seeds gain the same five items: five signs, all plus: 2 / 2^5, as with one seed.
    assert a.p == pytest.approx(2 / 2**5)
    assert a.difference == pytest.approx(0.5)
    # Items 2 to 6 gain under both seeds (2 steps each), 7 and 8 under seed 1 only (1 step each).
    assert b.p == pytest.approx(2 / 2**7)
    assert b.differences == pytest.approx((0.7, 0.5))
    # Two items lost, one by both seeds and one by seed 1: 2 / 2^2.
    assert general.p == pytest.approx(0.5)
    assert general.difference == pytest.approx(-0.15)
    assert [c.corrected for c in found.pooled] == pytest.approx([0.125, 3 * 2 / 2**7, 0.5])
    seed = next(c for c in found.by_seed if (c.name, c.seed) == ("b", 1))
    assert (seed.only_first, seed.only_second, seed.p) == (7, 0, pytest.approx(2 / 2**7))
    assert seed.corrected == pytest.approx(6 * 2 / 2**7)


def test_comparison_uses_the_seeds_and_items_that_both_sides_have(
    records: list[Raw], gathered: Gathered
) -> None:
    def last(method: str, seed: int) -> Raw:
        return next(r for r in records if (r["method"], r["seed"], r["stage"]) == (method, seed, 3))

    records.remove(last("sft", 44))
    task = last("sdft", 43)["tasks"]["garden"]
    del task["items"]["garden-0"], task["items"]["garden-1"]
    found = compare(gathered(records))
    garden = {c.second: c for c in found.pooled if (c.name, c.first) == ("garden", "sdft")}
    assert (garden["sft"].seeds, garden["sft"].expected) == ((42, 43), 3)
    assert garden["base"].seeds == (42, 43, 44)
    assert garden["sft"].items == garden["base"].items == 38
    pairs = {(c.first, c.second) for c in found.pooled}
    assert pairs == {("sdft", "base"), ("sft", "base"), ("sdft", "sft")}
    assert len(found.untested) == 1
    assert found.untested[0].startswith("capabilities.hellaswag, for want of scored items")


def test_methods_of_other_plans_are_not_compared(records: list[Raw], gathered: Gathered) -> None:
    renamed = [{**r, "plan": "b"} for r in records if r["method"] in ("base", "sft")]
    found = compare(gathered([r for r in records if r["method"] != "sft"] + renamed))
    assert {(c.first, c.second) for c in found.pooled} == {
        ("sdft (plan 5eed5eed)", "base (plan 5eed5eed)"),
        ("sft (plan b)", "base (plan b)"),
    }


def test_curves_run_on_over_stages_and_keep_both_values_where_one_ends(
    by_hand: list[Raw], gathered: Gathered
) -> None:
    for record in by_hand[1:]:
        start = 0.1 * record["seed"]
        record["curve"] = [
            {"step": 0, "drift/general": start, "note": "text"},
            {"step": 48, "drift/general": start + record["stage"]},
        ]
    methods = gathered(by_hand).methods
    curves = learning_curves(methods)
    assert list(curves) == ["drift/general"]
    first, _, mean = curves["drift/general"]
    assert (first.seed, mean.seed) == (1, None)
    assert first.steps == mean.steps == (0, 48, 48, 96)
    assert first.values == pytest.approx((0.1, 1.1, 0.1, 2.1))
    assert mean.values == pytest.approx((0.15, 1.15, 0.15, 2.15))
    assert stage_starts(methods) == [(48.0, "b")]


def test_no_mean_curve_where_a_seed_is_missing(by_hand: list[Raw], gathered: Gathered) -> None:
    for record in by_hand[1:]:
        record["curve"] = [{"step": 48, "drift/general": 0.5}]
    lines = learning_curves(gathered(by_hand[:4]).methods)["drift/general"]
    assert [(line.seed, line.steps) for line in lines] == [
        (1, (48, 96)),
        (2, (48,)),
        (None, (48,)),
    ]
    without = learning_curves(gathered(by_hand[:2] + by_hand[4:]).methods)["drift/general"]
    assert [line.seed for line in without] == [1]  # seed 2 lacks its first stage
