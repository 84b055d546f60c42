"""Weights of tokens that another engine sampled, against values worked out by hand."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.modules.run_callbacks import SamplerWatch
from sdft_lightning.rollout.mismatch import Mismatch

# Two completions of three and one token, of which the first one's first is not in the loss.
KEEP = torch.tensor([[False, True, True], [True, False, False]])
# p/q = 1/2 and 4; 3/2.
DIFFERENCE = torch.tensor([math.log(0.5), math.log(4.0), math.log(1.5)])


@pytest.mark.parametrize(
    ("kind", "cap", "expected"),
    [
        ("none", 2.0, [1.0, 1.0, 1.0]),
        ("token", 2.0, [0.5, 2.0, 1.5]),
        ("token", 5.0, [0.5, 4.0, 1.5]),
        # Capped first, then averaged over the completion's tokens in the loss: (0.5 + 2) / 2.
        ("sequence", 2.0, [1.25, 1.25, 1.5]),
        ("sequence", 5.0, [2.25, 2.25, 1.5]),
        ("sequence", 1.0, [0.75, 0.75, 1.0]),
    ],
)
def test_weights_are_capped_ratios_of_tokens_or_their_mean_over_the_completion(
    kind: Any, cap: float, expected: list[float]
) -> None:
    weights = Mismatch(kind, cap).weights(DIFFERENCE, KEEP)
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)


def test_weights_carry_no_gradient_and_an_overflowing_ratio_is_capped() -> None:
    difference = torch.tensor([500.0, 0.0, 0.0], requires_grad=True)
    weights = Mismatch("sequence").weights(difference, KEEP)
    assert not weights.requires_grad
    assert weights.tolist() == [1.5, 1.5, 1.0]


def test_statistics_by_hand() -> None:
    found = Mismatch("token", 2.0).statistics(DIFFERENCE)
    expected = (math.log(2.0) + math.log(4.0) + math.log(1.5)) / 3
    assert float(found["log_prob_difference"]) == pytest.approx(expected)
    assert float(found["log_prob_difference_max"]) == pytest.approx(math.log(4.0))
    assert float(found["ratio"]) == pytest.approx((0.5 + 4 + 1.5) / 3)
    assert float(found["capped_fraction"]) == pytest.approx(1 / 3)


def test_step_without_a_token_in_the_loss_has_finite_statistics() -> None:
    nothing = torch.zeros(0)
    keep = torch.zeros(2, 3, dtype=torch.bool)
    assert Mismatch("sequence").weights(nothing, keep).shape == (0,)
    assert float(Mismatch().statistics(nothing)["log_prob_difference"]) == 0.0


@pytest.mark.parametrize(
    ("options", "text"),
    [({"correction": "mean"}, "correction: got 'mean'"), ({"cap": 0.5}, "cap: got 0.5")],
)
def test_correction_that_cannot_be_meant_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=f"model.mismatch.{text}"):
        Mismatch(**options)


@pytest.mark.parametrize(
    "options", [{"warn_above": 0.0}, {"warn_growth": 1.0}, {"stop_above": -1.0}]
)
def test_alarm_that_cannot_be_meant_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"model.mismatch.{next(iter(options))}"):
        Mismatch(**options)


def warnings_of(watch: SamplerWatch, values: list[float], caplog: Any) -> list[str]:
    """Judge values one by one; the warnings with the index of the value."""
    found = []
    with caplog.at_level(logging.WARNING):
        for place, value in enumerate(values):
            caplog.clear()
            watch.judge(value, place)
            found += [f"{place}: {record.getMessage()}" for record in caplog.records]
    return found


def test_warning_is_given_once_above_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    found = warnings_of(SamplerWatch(Mismatch()), [0.01, 0.11, 0.12], caplog)
    assert [text.partition(" ")[0] for text in found] == ["1:"]
    assert "more than warn_above = 0.1" in found[0]
    assert "old weights" in found[0]


def test_growth_is_counted_from_the_first_five_steps(caplog: pytest.LogCaptureFixture) -> None:
    alarm = Mismatch(warn_above=10.0, warn_growth=3.0)
    start = [0.02, 0.04, 0.03, 0.02, 0.04]  # 0.03 in the mean
    found = warnings_of(SamplerWatch(alarm), [*start, 0.089, 0.091, 0.5], caplog)
    assert [text.partition(" ")[0] for text in found] == ["6:"]
    # Rounding noise of 1e-6 may grow by chance; that is no growth.
    assert warnings_of(SamplerWatch(alarm), [*[1e-6] * 5, 0.05], caplog) == []


def test_first_steps_survive_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    alarm = Mismatch(warn_above=10.0, warn_growth=3.0)
    before, after = SamplerWatch(alarm), SamplerWatch(alarm)
    warnings_of(before, [0.03] * 5, caplog)
    after.load_state_dict(before.state_dict())
    assert len(warnings_of(after, [0.2], caplog)) == 1


@pytest.mark.parametrize("value", [0.31, math.nan])
def test_run_stops_above_the_limit_and_on_what_is_no_number(value: float) -> None:
    watch = SamplerWatch(Mismatch(stop_above=0.3))
    watch.judge(0.3, 1)
    with pytest.raises(UserError, match=r"step 2: .*stop_above is 0\.3"):
        watch.judge(value, 2)
