"""The learning rate over a run, and how long the run is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, get_args

import lightning as L
import pytest

from sdft_lightning.errors import UserError
from sdft_lightning.modules import SFTModule
from sdft_lightning.modules.schedule import Schedule, ScheduleName

FitModule = Callable[..., Any]


class Rates(L.Callback):
    """Keeps the learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize(
    ("schedule", "accumulate", "expected"),
    [
        (Schedule(), 1, [cosine(step, 0, 6) for step in range(6)]),
        (Schedule(warmup_ratio=0.25), 2, [cosine(step, 2, 6) for step in range(6)]),
        (Schedule(warmup_steps=3), 1, [cosine(step, 3, 6) for step in range(6)]),
        (Schedule("linear", warmup_steps=2), 1, [0, 0.5, 1, 0.75, 0.5, 0.25]),
        (Schedule("constant", warmup_steps=2), 2, [0, 0.5, 1, 1, 1, 1]),
    ],
)
def test_learning_rate_moves_once_an_optimizer_step_along_the_named_curve(
    schedule: Schedule, accumulate: int, expected: list[float], fit_module: FitModule
) -> None:
    rates = Rates()
    fit_module(
        SFTModule,
        model={"schedule": schedule},
        max_steps=6,
        accumulate_grad_batches=accumulate,
        callbacks=[rates],
    )
    assert [rate / 2e-5 for rate in rates.rates] == pytest.approx(expected, abs=1e-9)


def rates_of(schedule: Schedule, total: int | None) -> list[float]:
    """The rates of six steps, without a run."""
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = schedule.build(optimizer, total)
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_every_schedule_of_transformers_is_built_but_those_that_measure() -> None:
    from transformers.trainer_utils import SchedulerType

    measured = {"reduce_lr_on_plateau", "greedy"}
    assert {each.value for each in SchedulerType} - set(get_args(ScheduleName)) == measured
    needed = {
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 2},
    }
    for name in get_args(ScheduleName):
        rates = rates_of(Schedule(name, warmup_steps=2, options=needed.get(name)), 6)
        assert rates[0] < max(rates[1:3]) <= 1.0, name
    floor = rates_of(Schedule("cosine_with_min_lr", options={"min_lr_rate": 0.5}), 5)
    assert floor[-1] == pytest.approx(0.5)
    stable = rates_of(
        Schedule("warmup_stable_decay", warmup_steps=1, options={"num_decay_steps": 2}), 6
    )
    assert stable[:5] == pytest.approx([0.0, 1.0, 1.0, 1.0, 1.0])
    assert rates_of(Schedule("inverse_sqrt", warmup_steps=1), None)[1] == 1.0


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Schedule("warmup_stable_decay"), "options: got None, and warmup_stable_decay refuses"),
        (Schedule("cosine", options={"min_lr": 1.0}), "got {'min_lr': 1.0}, and cosine refuses"),
    ],
)
def test_options_that_a_schedule_lacks_or_does_not_have_are_refused(
    schedule: Schedule, words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        rates_of(schedule, 6)
    module = SFTModule(schedule=schedule)
    with pytest.raises(UserError, match=re.escape(words)):  # no model is loaded yet
        module.check_before_fit([])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 4}, 4),
        ({"max_steps": -1, "max_epochs": 2}, 12),
        ({"max_steps": 100, "max_epochs": 2}, 12),
        ({"max_steps": 3, "max_epochs": 2}, 3),
        ({"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": 4}, 6),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 0.5}, 6),
    ],
)
def test_total_steps_foretells_the_optimizer_steps_that_the_run_makes(
    options: dict[str, Any], expected: int, fit_module: FitModule
) -> None:
    module = fit_module(SFTModule, **options)
    assert module.total_steps() == expected
    assert module.trainer.global_step == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "step"}, ["schedule.name", "'step'", "cosine, linear, constant"]),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, ["warmup_ratio 0.1", "warmup_steps 5", "one"]),
        ({"warmup_ratio": 1.0}, ["schedule.warmup_ratio", "1.0", "0 <= ratio < 1"]),
        ({"warmup_steps": -1}, ["schedule.warmup_steps", "-1", "0 and more"]),
        ({"name": "constant", "options": {"a": 1}}, ["schedule.options", "constant takes none"]),
    ],
)
def test_wrong_schedule_names_option_value_and_what_is_allowed(
    options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        Schedule(**options)
    assert all(word in str(error.value) for word in words)
