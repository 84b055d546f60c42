"""VLLMServerEngine against servers that send what no vLLM should: refused, or bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.rollout import RolloutRequest, Sampling, StudentPasses, VLLMServerEngine
from sdft_lightning.rollout.mismatch import Mismatch
from sdft_lightning.types import Tokens

pytestmark = pytest.mark.attack

VOCABULARY = 272  # of the tiny model
KEY = "vllm-key-0123456789"
REASON = {"finish_reason": "length"}
Change = dict[str, Any]


@pytest.fixture
def vllm(hostile: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that refreshes as vLLM does; `odd[path]` is sent in place of its answer."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    state = {"version": "none"}
    hostile.odd = {}
    hostile.choice = {
        "token_ids": [5, 6, 2],
        "logprobs": {"token_logprobs": [-1.0, -0.5, 0.0]},
        "finish_reason": "stop",
    }

    def answer(path: str, body: Any) -> Any:
        if path in hostile.odd:
            return hostile.odd[path]
        if path == "/update_weight_version":
            state["version"] = body["new_version"]
        config = {
            "model_config": {"logprobs_mode": "processed_logprobs"},
            "device_config": {"device": "cuda"},
        }
        answers = {
            "/v1/models": {"data": [{"id": "student"}]},
            "/server_info": {"vllm_config": config},
            "/reset_prefix_cache": {"success": True},
            "/weight_info": {"weight_version": state["version"]},
            "/v1/completions": {"choices": [hostile.choice]},
        }
        # json.dumps writes NaN and Infinity as Python's parser reads them.
        return 200, {}, json.dumps(answers.get(path, {})).encode()

    hostile.answer = answer
    return hostile


@pytest.fixture
def sample(vllm: Any, tmp_path: Path, model: Any) -> Callable[..., Any]:
    """Samples two completions of at most four tokens; the stop ids are 2 and 9."""

    def run(**options: Any) -> Any:
        few = {"timeout_seconds": 5.0, "max_retries": 1, "patience_seconds": 0.2}
        engine = VLLMServerEngine(vllm.url, exchange_folder=str(tmp_path), **{**few, **options})
        ids = torch.tensor([[3, 4, 5]])  # (1, P)
        sampling = Sampling(4, completions_per_prompt=2)
        mask = torch.ones_like(ids, dtype=torch.bool)
        request = RolloutRequest(Tokens(ids, mask), ["a"], sampling, 1, 0, [2, 9], 0)
        return engine.generate(StudentPasses("same").at(model, 0), request)

    return run


def log_probs(*values: Any) -> Change:
    return {"logprobs": {"token_logprobs": list(values)}}


def tokens(*ids: Any) -> Change:
    return {"token_ids": list(ids), **log_probs(*[-1.0] * len(ids)), **REASON}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (tokens(5, VOCABULARY, 6), "the token id 272, outside the vocabulary .*0 to 271"),
        (tokens(5, -1), "the token id -1, outside"),
        (tokens(5, -100), "the token id -100, outside"),
        (tokens(10**30), "outside the vocabulary"),
        (tokens(2**63), "outside the vocabulary"),
        (tokens(5, "6"), "'6' as token 2"),
        (tokens(5, 6.0), r"6\.0 as token 2"),
        (tokens(5, True), "True as token 2"),
        (tokens(5, None), "None as token 2"),
        (tokens([5]), r"\[5\] as token 1"),
        (tokens(5, 5, 5, 5, 5), "a completion of 5 tokens, where at most 4"),
        (tokens(5, 2, 6), "1 tokens behind the stop token 2"),
        (tokens(9, 5, 5, 2), "3 tokens behind the stop token 9"),
        (tokens(), "an empty completion"),
        ({**tokens(5), "finish_reason": "stop"}, "which does not end the student's"),
        (log_probs(-1.0, -1.0), "2 log-probabilities for 3 tokens"),
        (log_probs(-1.0, -1.0, -1.0, -1.0), "4 log-probabilities for 3 tokens"),
        (log_probs(-1.0, float("nan"), -1.0), "nan as the log-probability of token 2"),
        (log_probs(float("inf"), -1.0, -1.0), "inf as the log-probability of token 1"),
        (log_probs(float("-inf"), -1.0, -1.0), "-inf as the log-probability of token 1"),
        (log_probs(-9999.0, -1.0, -1.0), "-9999.0 as the log-probability"),
        (log_probs(0.5, -1.0, -1.0), "0.5 as the log-probability"),
        (log_probs("NaN", -1.0, -1.0), "'NaN' as the log-probability"),
        (log_probs("-1.0", -1.0, -1.0), "'-1.0' as the log-probability"),
        (log_probs(None, -1.0, -1.0), "None as the log-probability"),
        (log_probs(False, -1.0, -1.0), "False as the log-probability"),
        (log_probs(-(10**400), -1.0, -1.0), "as the log-probability of token 1"),
        ({"token_ids": "5 6 2"}, "lacks the list of token ids"),
        ({"token_ids": {"0": 5}}, "lacks the list of token ids"),
        ({"logprobs": {"token_logprobs": "-1"}}, "lacks the list of token ids"),
        ({"logprobs": []}, "is not one choice with token ids"),
        ({"finish_reason": None}, "failed 2 times .* ended for the reason None"),
        ({"finish_reason": "abort"}, "failed 2 times .* ended for the reason 'abort'"),
        ({"finish_reason": ["stop"]}, r"ended for the reason \['stop'\]"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_completion_that_cannot_be_one_is_refused_in_a_sentence_that_names_the_server(
    change: Change, told: str, vllm: Any, sample: Callable[..., Any]
) -> None:
    vllm.choice = {**vllm.choice, **change}
    with pytest.raises(UserError, match=told) as caught:
        sample()
    assert vllm.url in str(caught.value)
    assert str(caught.value).startswith("model.engine: ")
    assert len(str(caught.value)) < 900


def test_stop_token_as_the_last_allowed_one_is_whole_whatever_the_reason_says(
    vllm: Any, sample: Callable[..., Any]
) -> None:
    vllm.choice = {**vllm.choice, **tokens(5, 6, 7, 9)}
    assert sample().truncated.tolist() == [False, False]
    vllm.choice = {**vllm.choice, **tokens(5, 6, 7, 8)}
    assert sample().truncated.tolist() == [True, True]


@pytest.mark.parametrize("choices", [[], None, "text", {}, 3, [{}], [None], ["text"]], ids=repr)
def test_reply_without_one_choice_is_refused(
    choices: Any, vllm: Any, sample: Callable[..., Any]
) -> None:
    vllm.odd["/v1/completions"] = (200, {}, json.dumps({"choices": choices}).encode())
    with pytest.raises(UserError, match="is not one choice") as caught:
        sample()
    assert vllm.url in str(caught.value)


def test_more_choices_than_asked_for_are_refused(vllm: Any, sample: Callable[..., Any]) -> None:
    raw = json.dumps({"choices": [vllm.choice] * 2}).encode()
    vllm.odd["/v1/completions"] = (200, {}, raw)
    with pytest.raises(UserError, match="is not one choice"):
        sample()


PATHS = ["/collective_rpc", "/reset_prefix_cache", "/v1/completions", "/weight_info", "/v1/models"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "raw",
    [
        b"<html>\x1b[2J Bad gateway</html>",
        b"{",
        b'{"choices": ',
        b"\xff\xfe\xfa",
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
    ids=["html", "brace", "half", "no text", "deep", "digits"],
)
def test_reply_that_is_no_json_is_asked_for_again_and_then_told(
    raw: bytes, path: str, vllm: Any, sample: Callable[..., Any]
) -> None:
    vllm.odd[path] = (200, {"Content-Type": "text/html"}, raw)
    with pytest.raises(UserError, match="failed 2 times in one rollout") as caught:
        sample()
    text = str(caught.value)
    assert vllm.url in text
    assert path in text
    assert text.isprintable()
    assert len(text) < 900
    assert [asked for asked, _, _ in vllm.asked].count(path) <= 4


@pytest.mark.parametrize("path", ["/health", *PATHS, "/server_info"])
def test_redirect_is_refused_with_its_address_and_the_key_goes_nowhere(
    path: str, vllm: Any, sample: Callable[..., Any]
) -> None:
    target = f"{vllm.url}/elsewhere?key={KEY}\x1b[2J" + "x" * 1000
    vllm.odd[path] = (307, {"Location": target}, b"")
    with pytest.raises(UserError, match=r"sends .* on to .*/elsewhere") as caught:
        sample()
    text = str(caught.value)
    assert KEY not in text
    assert text.isprintable()
    assert len(text) < 900
    assert not [asked for asked, _, _ in vllm.asked if asked == "/elsewhere"]


@pytest.mark.parametrize("path", PATHS)
def test_server_that_drips_a_byte_at_a_time_is_given_up_in_time(
    path: str, vllm: Any, sample: Callable[..., Any]
) -> None:
    vllm.drips.add(path)
    started = time.monotonic()
    with pytest.raises(UserError, match="TimeoutError: no whole reply within 1 s"):
        sample(timeout_seconds=1.0, max_retries=0)
    assert time.monotonic() - started < 6


def test_health_that_drips_counts_as_down(vllm: Any, sample: Callable[..., Any]) -> None:
    vllm.drips.add("/health")
    with pytest.raises(UserError, match="no vLLM server answers"):
        sample(timeout_seconds=1.0)


def test_reply_without_end_is_refused_at_the_limit(vllm: Any, sample: Callable[..., Any]) -> None:
    vllm.odd["/v1/completions"] = (200, {}, b" " * 10_000_000)
    with pytest.raises(UserError, match=r"longer than 1,062,912 bytes"):
        sample()
    del vllm.odd["/v1/completions"]
    vllm.odd["/v1/models"] = (200, {}, b" " * 10_000_000)
    with pytest.raises(UserError, match=r"longer than 4,194,304 bytes"):
        sample()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500, 503, 599, 204, 304, 100 + 99])
def test_key_that_a_server_echoes_is_masked_whatever_the_status(
    status: int, vllm: Any, sample: Callable[..., Any]
) -> None:
    body = f"You sent {KEY}, Bearer {KEY}\x1b]0;x\x07" + "y" * 5000
    for path in ("/collective_rpc", "/v1/completions"):
        vllm.odd = {path: (status, {"X-Echo": KEY, "Location": KEY}, body.encode())}
        try:
            sample()
        except UserError as error:
            text = str(error)
            assert KEY not in text
            assert text.isprintable()
            assert len(text) < 1000
        else:
            assert (status, path) == (204, "/collective_rpc")  # an empty answer will do there


def test_key_in_names_and_versions_is_masked(vllm: Any, sample: Callable[..., Any]) -> None:
    vllm.odd["/weight_info"] = (200, {}, json.dumps({"weight_version": KEY}).encode())
    with pytest.raises(UserError, match=r"the weights are '\*\*\*'") as caught:
        sample()
    assert KEY not in str(caught.value)
    vllm.odd["/v1/models"] = (200, {}, json.dumps({"data": [{"id": [KEY]}]}).encode())
    with pytest.raises(UserError, match=r"names a model \['\*\*\*'\]"):
        sample()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"base_url": "http://me:hunter22@localhost:8000"}, "base_url: the address holds a user"),
        ({"base_url": ["http://h", "http://hunter22@h"]}, "base_url: the address holds a user"),
        ({"api_key_variable": "sk-hunter22"}, "api_key_variable: wants the name"),
    ],
)
def test_secrets_in_options_are_refused_and_not_printed_back(
    options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=rf"model\.engine\.{told}") as caught:
        VLLMServerEngine(**options)
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["none", "token", "sequence"])
def test_correction_refuses_what_would_make_the_weights_nan(kind: Any, value: float) -> None:
    difference, keep = torch.tensor([0.0, value]), torch.tensor([[True, True]])
    correction = Mismatch(kind)
    with pytest.raises(UserError, match="1 of 2 sampled tokens is not finite"):
        correction.weights(difference, keep)
    with pytest.raises(UserError, match=r"model\.mismatch"):
        correction.statistics(difference)


def test_odd_log_probs_end_a_run_before_its_weights_have_moved(
    vllm: Any, fit_module: Callable[..., Any], tmp_path: Path
) -> None:
    vllm.choice = {**vllm.choice, **log_probs(float("nan"), -1.0, -1.0)}
    engine = VLLMServerEngine(vllm.url, exchange_folder=str(tmp_path), max_retries=0)
    with pytest.raises(UserError, match="nan as the log-probability"):
        fit_module(
            model={"engine": engine, "mismatch": Mismatch("token")},
            default_root_dir=tmp_path,
            enable_checkpointing=True,
        )
    assert list(tmp_path.rglob("*.ckpt")) == []
