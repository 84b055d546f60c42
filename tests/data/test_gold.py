"""The line that a graded set prints about its own demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sdft_lightning.data.gold import gold_report
from sdft_lightning.types import Demonstration


def row(number: int, text: str, reference: list[str]) -> Demonstration:
    shown = [{"role": "assistant", "content": text}] if text else []
    return Demonstration(str(number), [], shown, None, reference, f"file, line {number}")


def test_it_counts_and_names_the_first_that_fails() -> None:
    rows = [row(1, "It is red.", ["red"]), row(2, "No idea.", ["blue"]), row(3, "", ["x"])]
    line = gold_report("validation", "contains", rows)
    assert "validation: grader contains" in line
    assert "1 of 2 right" in line
    assert "file, line 2" in line
    assert "fails" not in gold_report("validation", "contains", rows[:1])
    assert gold_report("validation", "contains", rows[2:]) == ""


def test_a_fit_prints_it(
    run_cli: Callable[..., None],
    fit_args: list[str],
    train_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_cli(
        *fit_args,
        f"--data.validation={train_file}",
        "--data.grader=contains",
        "--data.columns.reference=reference",
        "--trainer.limit_val_batches=0",
    )
    assert "grader contains: the demonstrations themselves get 12 of 12 right" in (
        capsys.readouterr().err
    )
