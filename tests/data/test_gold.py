"""The line that a graded set prints about its own demonstrations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sdft_lightning.data.sets import gold_report
from sdft_lightning.graders import GRADERS
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


def test_without_demonstrations_the_references_are_graded() -> None:
    line = gold_report("test", "contains", [row(1, "", ["red", "scarlet"])])
    assert line == "test: grader contains: the references themselves get 1 of 1 right"
    assert gold_report("test", "contains", []) == ""


def test_golden_calls_are_rendered_as_the_graders_read_them() -> None:
    calls = [{"Action": "get", "Action_Input": '{"id": {"n": 1}}'}]
    rows = [row(1, "", [])._replace(reference=calls)]
    assert gold_report("test", "tool_call", rows).endswith("themselves get 1 of 1 right")
    assert "0 of 1 right" in gold_report("test", "tool_call_released", rows)  # cut short


def test_of_a_grader_of_the_users_own_without_demonstrations_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(GRADERS, "length", lambda text, reference: float(len(text) == reference))
    assert gold_report("test", "length", [row(1, "", ["x"])]) == ""


@pytest.mark.parametrize(("grader", "passed"), [("tool_call", 97), ("tool_call_released", 95)])
def test_the_real_tool_calls_as_the_paper_and_we_grade_them(
    shared_data: Path, grader: str, passed: int
) -> None:
    path = shared_data / "demonstrations" / "tooluse" / "test_97.jsonl"
    found = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    rows = [row(i, "", raw["golden_answer"]) for i, raw in enumerate(found)]
    line = gold_report("test", grader, rows)
    assert f"the references themselves get {passed} of 97 right" in line


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
