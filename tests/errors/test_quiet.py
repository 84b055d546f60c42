"""Notices that would mislead are kept off the screen, and nothing else of their speakers."""

from __future__ import annotations

import logging
import warnings

import pytest
from lightning.pytorch.trainer.connectors.checkpoint_connector import log as saving

from sdft_lightning.errors import quieten


@pytest.fixture(autouse=True)
def kept_filters() -> object:
    before = list(saving.filters)
    with warnings.catch_warnings():
        quieten()
        yield
    saving.filters[:] = before


def test_saving_the_whole_state_does_not_sound_like_unsafe_loading(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger=saving.name):
        saving.info("`weights_only` was not set, defaulting to `False`.")
        saving.info("something else")
    assert caplog.messages == ["something else"]
