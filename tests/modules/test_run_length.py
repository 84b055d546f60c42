"""A run says how many optimizer steps its rows come to, and warns where they are few."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from sdft_lightning.modules import SFTModule


@pytest.fixture
def messages(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("sdft_lightning"), "propagate", True)
    caplog.set_level(logging.INFO, logger="sdft_lightning")
    return caplog


def warned(messages: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in messages.messages if "teaches hardly anything" in text]


def test_rows_of_one_epoch_that_are_few_steps_are_told(
    fit_module: Callable[..., Any], messages: pytest.LogCaptureFixture
) -> None:
    fit_module(SFTModule, max_steps=-1, max_epochs=1, accumulate_grad_batches=2)
    assert (
        "fit: 12 rows, 6 batches of 2 an epoch on each device; 4 prompts are one optimizer step: "
        "3 optimizer steps in all"
    ) in messages.messages
    (text,) = warned(messages)
    assert text.startswith("data.train: the whole run is 3 optimizer steps")
    assert "--trainer.max_epochs" in text


def test_steps_that_were_asked_for_by_number_are_no_surprise(
    fit_module: Callable[..., Any], messages: pytest.LogCaptureFixture
) -> None:
    fit_module(SFTModule, max_steps=1)
    assert any("1 optimizer step in all" in text for text in messages.messages)
    assert warned(messages) == []


def test_enough_steps_are_not_warned_of(
    fit_module: Callable[..., Any], messages: pytest.LogCaptureFixture
) -> None:
    fit_module(SFTModule, max_steps=-1, max_epochs=2)
    assert any("12 optimizer steps in all" in text for text in messages.messages)
    assert warned(messages) == []
