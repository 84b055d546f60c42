"""A judge in a run: asked before it about gold answers, and in it about the student's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def validate(run_cli: Callable[..., None], model_folder: Path, rows: Path, *more: str) -> None:
    run_cli(
        "validate",
        "--model=SFTModule",
        f"--model.policy.name={model_folder}",
        "--model.evaluation.max_new_tokens=4",
        f"--data.validation={rows}",
        "--data.grader=medical",
        "--data.columns.reference=reference",
        "--data.prompts.style=turns",
        "--trainer.accelerator=cpu",
        "--run.name=judged",
        *more,
    )


def test_a_validation_is_judged_counted_and_paid_for(
    run_cli: Callable[..., None],
    model_folder: Path,
    train_file: Path,
    tmp_path: Path,
    endpoint: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def reply(body: dict[str, Any]) -> str:
        shown = json.loads(body["messages"][1]["content"])
        gold = shown["answer"].startswith("It is ")
        if not gold and shown["question"] == "Q3?":
            return "I cannot say."
        return json.dumps(
            {"verdict": "correct" if gold or "1" in shown["question"] else "incorrect"}
        )

    endpoint.reply = reply
    validate(
        run_cli,
        model_folder,
        train_file,
        "--data.judge.model=tiny",
        f"--data.judge.base_url={endpoint.url}",
        "--data.judge.max_unreadable=0",
        "--data.judge.gold_rows=2",
        f"--data.judge.cache={tmp_path / 'verdicts'}",
        "--data.judge.input_price=1",
        "--data.judge.output_price=2",
    )
    errors = capsys.readouterr().err
    assert "grader medical: the demonstrations themselves get 2 of 2 right" in errors
    assert "1 of 12 answers have no verdict" in errors
    assert "judge tiny: 13 answers judged, 0 of them from the cache, 1 without a verdict" in errors
    assert "cost 0.0020" in errors  # 14 requests of 100 and 20 tokens
    (line,) = (tmp_path / "runs/judged/validate-0/metrics.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["val/task/task/accuracy"] == pytest.approx(3 / 11)  # Q1, Q10, Q11; Q3 is out
    assert found["val/judge/unjudged"] == 1.0
    assert found["val/judge/cost"] == pytest.approx(14 * (100 + 40) / 1e6)


def test_without_a_judge_the_run_does_not_start(
    run_cli: Callable[..., None],
    model_folder: Path,
    train_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        validate(run_cli, model_folder, train_file)
    assert "Set data.judge" in capsys.readouterr().err


def test_an_endpoint_that_is_not_there_ends_the_run_before_it_starts(
    run_cli: Callable[..., None],
    model_folder: Path,
    train_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        validate(
            run_cli,
            model_folder,
            train_file,
            "--data.judge.model=tiny",
            "--data.judge.base_url=http://127.0.0.1:9/v1",
            "--data.judge.max_retries=0",
            f"--data.judge.cache={tmp_path / 'verdicts'}",
        )
    errors = capsys.readouterr().err
    assert "APIConnectionError" in errors
    assert "token_f1, which needs no endpoint" in errors


def test_a_preflight_asks_too(
    run_cli: Callable[..., None],
    fit_args: list[str],
    tmp_path: Path,
    endpoint: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left_out = ("--trainer.max_steps", "--trainer.enable_model_summary")
    with pytest.raises(SystemExit):
        run_cli(
            "preflight",
            *(arg for arg in fit_args[1:] if not arg.startswith(left_out)),
            "--data.grader=knowledge",
            "--data.columns.reference=reference",
            "--data.judge.model=tiny",
            f"--data.judge.base_url={endpoint.url}",
            f"--data.judge.cache={tmp_path / 'verdicts'}",
            "--rows=3",
        )
    found = json.loads((tmp_path / "runs/a/preflight-0/preflight.json").read_text())
    assert (found["student"]["accuracy"], found["teacher"]["accuracy"]) == (1.0, 1.0)
    asked = {json.loads(body["messages"][1]["content"])["question"] for body in endpoint.requests}
    assert len(asked) == 3
