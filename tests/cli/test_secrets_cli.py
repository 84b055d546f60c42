"""Secrets in options, echoed keys and control codes: neither on a screen nor in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.callbacks.terminal import result_table
from sdft_lightning.continual.plan_file import build_plan
from sdft_lightning.continual.report.records import plain
from sdft_lightning.errors import UserError
from sdft_lightning.files.endpoints import check_no_secrets
from sdft_lightning.graders import check_reference

pytestmark = pytest.mark.attack

SECRET = "hunter22"
KEY = "judge-key-0123456789"


def files_with(secret: str, folder: Path) -> list[Path]:
    """All files below a folder that hold a text."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (f"--data.judge.base_url=http://me:{SECRET}@127.0.0.1:9/v1", "data.judge.base_url"),
        (f"--data.judge.base_url=https://{SECRET}@127.0.0.1:9/v1", "data.judge.base_url"),
        (f"--data.judge.api_key_variable=sk-{SECRET}-0123456789", "data.judge.api_key_variable"),
        (f"--data.train=https://me:{SECRET}@127.0.0.1:9/a.jsonl", "data.train"),
        (f"--model.policy.name=https://me:{SECRET}@127.0.0.1:9/a", "model.init_args.policy.name"),
    ],
)
def test_secret_in_an_option_is_refused_before_anything_is_written(
    option: str,
    told: str,
    run_cli: Callable[..., None],
    fit_args: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = option.partition("=")[0]
    with pytest.raises(SystemExit) as stop:
        run_cli(*(arg for arg in fit_args if not arg.startswith(f"{name}=")), option)
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert f"error: {told}: " in err
    assert SECRET not in out + err
    assert not (tmp_path / "runs").exists()
    assert files_with(SECRET, tmp_path) == []


def test_secret_in_an_engines_address_is_refused_whoever_builds_it(
    run_cli: Callable[..., None],
    fit_args: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    engine = ["--model.engine=VLLMServerEngine", "--model.engine.base_url"]
    with pytest.raises(SystemExit):
        run_cli(*fit_args, engine[0], f"{engine[1]}=http://me:{SECRET}@127.0.0.1:9")
    with pytest.raises(SystemExit):
        run_cli(*fit_args, engine[0], f"--model.engine.api_key_variable=sk-{SECRET}-0123456789")
    out, err = capfd.readouterr()
    assert err.count("error: ") == 2
    assert SECRET not in out + err
    assert files_with(SECRET, tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [
        {"judge": {"base_url": f"http://me:{SECRET}@h/v1"}},
        {"held_out": [{"source": f"s3://me:{SECRET}@bucket/x"}]},
        {"logger": {"init_args": {"api_key": SECRET}}},
        {"logger": [{"init_args": {"tracking_uri": f"postgresql://me:{SECRET}@h/db"}}]},
    ],
    ids=str,
)
def test_secrets_are_found_wherever_options_are_nested(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="it holds a secret") as caught:
        check_no_secrets({"data": options})
    assert SECRET not in str(caught.value)
    assert "data." in str(caught.value)


def test_plan_with_a_secret_is_refused_before_it_is_kept() -> None:
    plan = {
        "data": {"judge": {"base_url": f"http://me:{SECRET}@h/v1"}},
        "methods": {},
        "stages": [],
    }
    with pytest.raises(UserError, match=r"data\.judge\.base_url") as caught:
        build_plan(plan)
    assert SECRET not in str(caught.value)


def test_options_without_secrets_are_taken() -> None:
    texts = ["ssh://git@host/x", "hf://datasets/a/b@main", "See http://a:b@c for more.", "a@b.c"]
    check_no_secrets({"a": texts, "api_key_variable": "OPENAI_API_KEY", "api_key": None, "n": 3})


def test_key_that_a_judge_echoes_reaches_neither_console_nor_any_file(
    run_cli: Callable[..., None],
    model_folder: Path,
    train_file: Path,
    tmp_path: Path,
    hostile: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def answer(path: str, body: Any) -> Any:
        shown = json.loads(body["messages"][1]["content"])
        if not shown["answer"].startswith("It is "):
            echo = {"error": {"message": f"\x1b[2JBearer {KEY}"}}
            return 401, {"X-Echo": KEY}, json.dumps(echo).encode()
        content = json.dumps({"reason": f"\x1b[2J{KEY}", "verdict": "correct"})
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        sent = {"id": KEY, "object": "chat.completion", "created": 0, "model": KEY}
        return 200, {}, json.dumps({**sent, "choices": [choice]}).encode()

    def as_json(path: str, body: Any) -> Any:
        status, headers, raw = answer(path, body)
        return status, {"Content-Type": "application/json", **headers}, raw

    hostile.answer = as_json
    run_cli(
        "validate",
        "--model=SFTModule",
        f"--model.policy.name={model_folder}",
        "--model.evaluation.max_new_tokens=4",
        f"--data.validation={train_file}",
        "--data.grader=medical",
        "--data.columns.reference=reference",
        "--data.prompts.style=turns",
        "--data.judge.model=tiny",
        f"--data.judge.base_url={hostile.url}/v1",
        "--data.judge.api_key_variable=JUDGE_KEY",
        "--data.judge.gold_rows=2",
        f"--data.judge.cache={tmp_path / 'verdicts'}",
        "--trainer.accelerator=cpu",
        "--run.name=judged",
    )
    out, err = capfd.readouterr()
    assert "the demonstrations themselves get 2 of 2 right" in err
    assert "Bearer ***" in err
    assert KEY not in out + err
    assert "\x1b[2J" not in out + err
    assert files_with(KEY, tmp_path) == []
    assert list((tmp_path / "verdicts").iterdir())


def test_control_codes_in_names_do_not_reach_the_result_table() -> None:
    name = "val/task/a\x1b[2Jb/accuracy"
    table = result_table({name: 0.5, f"{name}_low": 0.4, f"{name}_high": 0.6}, "val")
    assert "\x1b" not in table
    assert "a [2Jb" in table


def test_control_codes_and_megabytes_in_a_rows_reference_make_a_short_sentence() -> None:
    for reference in ("\x1b[2J" * 1_000_000, ["", "\x1b[2J" * 1_000_000], {"a": "b" * 1_000_000}):
        with pytest.raises(UserError) as caught:
            check_reference("choice", reference, "rows, row 0")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 700


def test_report_masks_what_a_record_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANY_API_KEY", KEY)
    assert plain(f"failed: {KEY}\x1b[2J") == "failed: *** [2J"
