"""A judge that sends what it should not: no verdict, never the end of a run; nothing leaks."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.errors import UserError
from sdft_lightning.graders import Answer, Judge, JudgeSettings

pytestmark = pytest.mark.attack

ANSWER = Answer("What is it?", "It is red.", "Red, I think.")
KEY = "judge-key-0123456789"
RIGHT = '{"reason": "Because.", "verdict": "correct"}'


def completion(content: Any = RIGHT, **message: Any) -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content, **message}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }


@pytest.fixture
def judge_of(hostile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Judge]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    reply(hostile, completion())

    def make(**changes: Any) -> Judge:
        few = {"max_retries": 0, "max_unreadable": 1, "timeout_seconds": 10.0, "input_price": 2.0}
        settings = {"model": "tiny", "base_url": f"{hostile.url}/v1", "output_price": 1.0, **few}
        return Judge(JudgeSettings(**{**settings, **changes}), tmp_path / "judge")

    return make


def reply(
    hostile: Any, body: Any, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **(headers or {})}
    hostile.answer = lambda path, asked: (status, sent, raw)


def cost_of(judge: Judge) -> float:
    cost = judge.cost(judge.take_usage())
    assert cost is not None
    assert math.isfinite(cost)
    assert cost >= 0
    return cost


DEEP = b"[" * 100_000
NO_COMPLETIONS: dict[str, Any] = {
    "ten megabytes": json.dumps(completion("x" * 10_000_000)).encode(),
    "megabytes of blanks": b" " * 10_000_000,
    "no choices": {**completion(), "choices": []},
    "choices null": {**completion(), "choices": None},
    "choices a text": {**completion(), "choices": "x"},
    "choice null": {**completion(), "choices": [None]},
    "content null": completion(None),
    "content a number": completion(3),
    "content parts": completion([{"type": "text", "text": RIGHT}]),
    "tool call": completion(
        None, tool_calls=[{"id": "1", "type": "function", "function": {"name": "f"}}]
    ),
    "deep": DEEP,
    "deep content": b'{"choices": ' + DEEP,
    "deep object": b'{"choices":' * 50_000,
    "content of deep JSON": completion("[" * 100_000),
    "half": b'{"choices": [{"mess',
    "html": b"<html>\x1b[2J Bad gateway</html>",
    "empty": b"",
    "no text": b"\xff\xfe\xfa\x00",
    "digits": b'{"choices": ' + b"1" * 5000 + b"}",
    "list": [],
    "null": None,
    "lone surrogate": completion("\ud800"),
}


@pytest.mark.parametrize("body", NO_COMPLETIONS.values(), ids=NO_COMPLETIONS)
def test_reply_without_verdict_counts_as_unjudged_and_is_told_once(
    body: Any, hostile: Any, judge_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reply(hostile, body)
    judge = judge_of()
    for _ in range(2):
        scores = judge.grade("medical", [ANSWER, ANSWER._replace(text="Blue.")])
        assert all(math.isnan(score) for score in scores)
    assert judge.usage.unjudged == 4
    assert len([r for r in caplog.records if "have no verdict" in r.getMessage()]) == 1
    text = caplog.records[-1].getMessage()
    assert text.isprintable()
    assert len(text) < 700
    assert cost_of(judge) < 1
    judge.grade("medical", [ANSWER])  # the next validation tells it again
    assert len([r for r in caplog.records if "have no verdict" in r.getMessage()]) == 2


@pytest.mark.parametrize("text", ["question", "reference", "text"])
def test_half_a_character_in_a_question_is_no_verdict_for_it_alone(
    text: str, hostile: Any, judge_of: Any
) -> None:
    scores = judge_of().grade("medical", [ANSWER._replace(**{text: "a\ud800"}), ANSWER])
    assert math.isnan(scores[0])
    assert scores[1] == 1.0
    assert len(hostile.asked) == 1


@pytest.mark.parametrize("reason", ["\ud800", "\\ud800"], ids=["character", "escape"])
def test_half_a_character_in_a_reason_does_not_break_the_cache(
    reason: str, hostile: Any, judge_of: Any
) -> None:
    reply(hostile, completion('{"reason": "' + reason + '", "verdict": "correct"}'))
    assert judge_of().grade("medical", [ANSWER]) == [1.0]
    assert judge_of().grade("medical", [ANSWER]) == [1.0]
    assert len(hostile.asked) == 1


@pytest.mark.parametrize(
    "count", [-5, 10**30, 10**18, "many", None, 1.5, [], {}, float("nan")], ids=repr
)
def test_absurd_counts_of_tokens_are_left_out_and_the_cost_stays_finite(
    count: Any, hostile: Any, judge_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": 20, "total_tokens": count}
    reply(hostile, {**completion(), "usage": usage})
    judge = judge_of()
    assert judge.grade("medical", [ANSWER, ANSWER._replace(text="Blue.")]) == [1.0, 1.0]
    assert cost_of(judge) == pytest.approx(40e-6)
    told = [r for r in caplog.records if "what is no count" in r.getMessage()]
    assert len(told) == (count is not None)


@pytest.mark.parametrize("usage", [None, "x", 3, [], {}, {"prompt_tokens": {"a": 1}}], ids=repr)
def test_usage_of_another_form_is_no_cost(usage: Any, hostile: Any, judge_of: Any) -> None:
    reply(hostile, {**completion(), "usage": usage})
    judge = judge_of()
    assert judge.grade("medical", [ANSWER]) == [1.0]
    assert cost_of(judge) == 0


def test_judge_that_drips_is_given_up_in_time(hostile: Any, judge_of: Any) -> None:
    hostile.drips.add("/v1/chat/completions")
    started = time.monotonic()
    judge = judge_of(timeout_seconds=0.5)
    assert math.isnan(judge.grade("medical", [ANSWER])[0])
    assert time.monotonic() - started < 5
    assert judge.take_usage().unjudged == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed_and_its_address_is_told(
    status: int, hostile: Any, judge_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    target = f"{hostile.url}/elsewhere?{KEY}\x1b[2J" + "x" * 1000
    reply(hostile, b"", status, {"Location": target})
    assert math.isnan(judge_of(max_retries=3).grade("medical", [ANSWER])[0])
    assert [path for path, _, _ in hostile.asked] == ["/v1/chat/completions"]
    assert "/elsewhere?***" in caplog.text
    assert KEY not in caplog.text
    with pytest.raises(UserError, match="sends the request on to"):
        judge_of().check("medical", [ANSWER])


def test_compressed_reply_is_not_unpacked(hostile: Any, judge_of: Any) -> None:
    import gzip

    raw = gzip.compress(json.dumps(completion("x" * 50_000_000)).encode())
    reply(hostile, raw, 200, {"Content-Encoding": "gzip"})
    assert math.isnan(judge_of().grade("medical", [ANSWER])[0])
    assert hostile.asked[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [200, 400, 401, 403, 429, 500])
def test_key_that_an_endpoint_echoes_is_nowhere(
    status: int,
    hostile: Any,
    judge_of: Any,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    caplog.set_level("DEBUG", logger="sdft_lightning")
    echo = f"You sent Bearer {KEY} \x1b]0;x\x07"
    reply(hostile, {"error": {"message": echo}}, status, {"X-Echo": KEY})
    judge_of().grade("medical", [ANSWER])
    with pytest.raises(UserError) as caught:
        judge_of().check("medical", [ANSWER])
    escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)
    reply(hostile, completion('{"reason": "' + escaped + KEY + '", "verdict": "correct"}'))
    assert judge_of().grade("medical", [ANSWER]) == [1.0]
    chain: BaseException | None = caught.value
    while chain is not None:  # a traceback prints all of it
        assert KEY not in str(chain)
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    assert KEY not in caplog.text
    assert all(record.getMessage().isprintable() for record in caplog.records)
    for path in (tmp_path / "judge").iterdir():
        assert KEY not in path.read_text()


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place", ["tempfile.mkstemp", "os.replace", "os.fdopen", "pathlib.Path.mkdir"]
)
def test_full_cache_costs_no_verdict_and_leaves_no_half_file(
    place: str,
    judge_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    judge = judge_of()
    monkeypatch.setattr(place, full)
    scores = judge.grade("medical", [ANSWER, ANSWER._replace(text="Blue.")])
    monkeypatch.undo()
    assert scores == [1.0, 1.0]
    assert caplog.text.count("could not be kept") == 1
    assert "No space left on device" in caplog.text
    assert "data.judge.cache" in caplog.text
    assert list(tmp_path.glob("judge/*")) == []


def test_cache_in_a_place_that_is_no_folder_costs_no_verdict(
    judge_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "judge").write_text("a file")
    assert judge_of().grade("medical", [ANSWER]) == [1.0]
    assert "could not be kept" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [DEEP, b"\xff\xfe", b"", b"3", b'{"reply": 3}', b'{"reply": "' + b"x" * 20_000_000 + b'"}'],
    ids=["deep", "no text", "empty", "number", "no text in it", "too long"],
)
def test_damaged_cache_is_asked_anew(
    damage: bytes, hostile: Any, judge_of: Any, tmp_path: Path
) -> None:
    judge_of().grade("medical", [ANSWER])
    (path,) = (tmp_path / "judge").iterdir()
    path.write_bytes(damage)
    assert judge_of().grade("medical", [ANSWER]) == [1.0]
    assert len(hostile.asked) == 2


def test_cache_entry_that_is_a_pipe_or_a_folder_does_not_hang_a_run(
    hostile: Any, judge_of: Any, tmp_path: Path
) -> None:
    judge_of().grade("medical", [ANSWER])
    (path,) = (tmp_path / "judge").iterdir()
    path.unlink()
    os.mkfifo(path)
    assert judge_of().grade("medical", [ANSWER]) == [1.0]
    path.unlink()
    path.mkdir()
    assert judge_of().grade("medical", [ANSWER]) == [1.0]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("base_url", "http://me:hunter22@localhost/v1"),
        ("base_url", "https://hunter22@localhost/v1"),
        ("base_url", "http://localhost/v1?api_key=hunter22"),
        ("api_key_variable", "sk-hunter22"),
        ("api_key_variable", "hunter22 with a blank"),
        ("timeout_seconds", math.nan),
        ("timeout_seconds", math.inf),
        ("temperature", math.nan),
        ("input_price", math.nan),
        ("output_price", math.inf),
    ],
)
def test_secrets_and_numbers_that_are_none_are_refused_and_secrets_not_printed_back(
    option: str, value: Any, judge_of: Any
) -> None:
    with pytest.raises(UserError, match=rf"data\.judge\.{option}") as caught:
        judge_of(**{option: value})
    assert "hunter22" not in str(caught.value)


def test_secret_in_the_environments_address_is_refused_too(
    judge_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:hunter22@localhost/v1")
    with pytest.raises(UserError, match="OPENAI_BASE_URL") as caught:
        judge_of(base_url=None)
    assert "hunter22" not in str(caught.value)
