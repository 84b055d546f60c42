"""bfloat16 where the hardware has none: told before minutes are lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from sdft_lightning.modules import precision


@pytest.mark.parametrize(
    ("name", "native", "warned"),
    [
        ("bf16-mixed", False, True),
        ("bf16-true", False, True),
        ("bf16-mixed", True, False),
        ("32-true", False, False),
        ("16-mixed", False, False),
    ],
)
def test_only_bfloat16_without_hardware_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, name: str, native: bool, warned: bool
) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda device: native)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        precision.warn_of_slow_precision(name, torch.device("cpu"))
    assert [f"trainer.precision: {name}" in str(each.message) for each in caught] == [True] * warned


def test_fit_warns_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., None], fit_args: list[str]
) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="--trainer.precision=32-true"):
        run_cli(*fit_args, "--trainer.precision=bf16-mixed", "--trainer.max_steps=1")
