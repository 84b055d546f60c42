"""VLLMServerEngine against a local server that answers as vLLM's does, and fails in its ways."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.rollout import RolloutRequest, Sampling, StudentPasses, VLLMServerEngine
from sdft_lightning.rollout.sampling import row_seeds
from sdft_lightning.rollout.vllm.client import VLLMClient
from sdft_lightning.types import Rollout, Tokens

FakeServer = Any  # see conftest.py
NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def engine(server: FakeServer, tmp_path: Path) -> VLLMServerEngine:
    """An engine that gives up soon."""
    return make_engine(server, tmp_path)


def make_engine(server: FakeServer, folder: Path, **options: Any) -> VLLMServerEngine:
    few = {"timeout_seconds": 1.0, "max_retries": 2, "patience_seconds": 0.2, "dtype": "float32"}
    return VLLMServerEngine(server.url, exchange_folder=str(folder), **{**few, **options})


def generate(engine: VLLMServerEngine, model: Any, step: int = 0) -> Rollout:
    sampling = Sampling(5, 0.7, min_p=0.1, completions_per_prompt=2)
    ids = torch.tensor([[0, 0, 5], [3, 4, 5]])  # (2, P), the first padded
    mask = torch.tensor([[False, False, True], [True, True, True]])  # (2, P)
    request = RolloutRequest(Tokens(ids, mask), ["a", "b"], sampling, 1, step, [2, 9], 0)
    return engine.generate(StudentPasses("same").at(model, 0), request)


def weight(model: Any) -> float:
    """What the fake server's log-probabilities tell of the weight."""
    return -abs(float(model.get_parameter(NAME).detach()[0, 0]))


def test_requests_are_token_ids_with_every_option_given(
    server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    generate(engine, model)
    asked = sorted(server.completions, key=lambda body: (len(body["prompt"]), body["seed"]))
    assert [body.pop("prompt") for body in asked] == [[5], [5], [3, 4, 5], [3, 4, 5]]
    seeds = row_seeds(1, 0, ["a", "b"], 2)
    assert [body.pop("seed") for body in asked] == [*sorted(seeds[:2]), *sorted(seeds[2:])]
    assert asked[0] == {
        "model": "student",
        "n": 1,
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [2, 9],
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }


def test_rows_with_a_length_of_their_own_are_asked_for_with_it(
    server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    ids, mask = torch.tensor([[5]]), torch.tensor([[True]])
    requests = [
        RolloutRequest(Tokens(ids, mask), [name], Sampling(most), 1, 0, [2, 9], 0)
        for name, most in (("a", 5), ("b", 9))
    ]
    engine.sample(StudentPasses("same").at(model, 0), requests)
    assert sorted(body["max_tokens"] for body in server.completions) == [5, 9]


def test_answers_stand_in_the_order_of_the_rows(
    server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    def slow_first(body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.1 if len(body["prompt"]) == 1 else 0.0)
        cut = len(body["prompt"]) == 1
        choice = server.default_choice(body)
        if cut:
            choice = {**choice, "token_ids": [1], "finish_reason": "length"}
            choice["logprobs"] = {"token_logprobs": [-3.0]}
        return choice

    server.choice = slow_first
    rollout = generate(engine, model)
    assert rollout.completion_ids.tolist() == [[1, 0], [1, 0], [3, 2], [3, 2]]
    assert rollout.completion_mask.sum(dim=1).tolist() == [1, 1, 2, 2]
    assert rollout.truncated.tolist() == [True, True, False, False]
    assert rollout.sampled_log_probs[0].tolist() == [-3.0, 0.0]
    assert rollout.sampled_log_probs[3, 1] == -0.25


def test_each_rollout_begins_with_a_refresh_and_ends_with_a_look_at_the_version(
    server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    for step in range(2):
        model.get_parameter(NAME).data += 1.0
        rollout = generate(engine, model, step)
        assert float(rollout.sampled_log_probs[0, 0]) == pytest.approx(weight(model))
    refresh = ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
    round_trip = [*refresh, *["/v1/completions"] * 4, "/weight_info"]
    assert server.asked == ["/v1/models", "/server_info", *round_trip, *round_trip]


def failing(server: FakeServer, path: str, times: int, status: int) -> list[str]:
    """Let the first requests to a path fail; returns the failures as they come."""
    failures: list[str] = []

    def fault(asked: str) -> int | None:
        if asked == path and len(failures) < times:
            failures.append(asked)
            server.restart()  # what a crash does to the weights
            return status
        return None

    server.fault = fault
    return failures


@pytest.mark.parametrize("status", [500, 503, 429, 0])
@pytest.mark.parametrize("path", ["/collective_rpc", "/v1/completions", "/weight_info"])
def test_fault_in_any_place_begins_the_rollout_again_with_a_refresh(
    path: str, status: int, server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    failures = failing(server, path, 1, status)
    rollout = generate(engine, model)
    assert failures == [path]
    # Each row comes from our weights, and none from those of the restarted server.
    assert rollout.sampled_log_probs[:, 0].tolist() == pytest.approx([weight(model)] * 4)


def test_quick_restart_that_no_request_noticed_is_seen_by_the_version(
    server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    restarts = []

    def restart_once(body: dict[str, Any]) -> dict[str, Any]:
        if not restarts:
            restarts.append(body)
            server.restart()
        return server.default_choice(body)

    server.choice = restart_once
    rollout = generate(engine, model)
    assert server.asked.count("/collective_rpc") == 2
    assert rollout.sampled_log_probs[:, 0].tolist() == pytest.approx([weight(model)] * 4)


def test_request_that_hangs_is_given_up_in_time(
    server: FakeServer, tmp_path: Path, model: Any
) -> None:
    engine = make_engine(server, tmp_path, timeout_seconds=1.0, max_retries=0)

    def hang(body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(3)
        return server.default_choice(body)

    server.choice = hang
    started = time.monotonic()
    with pytest.raises(UserError, match=r"failed 1 times .*/v1/completions: TimeoutError"):
        generate(engine, model)
    assert time.monotonic() - started < 2.9


def test_retries_are_bounded_and_the_error_names_server_tries_and_remedy(
    server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    failures = failing(server, "/collective_rpc", 99, 500)
    with pytest.raises(UserError) as caught:
        generate(engine, model)
    assert len(failures) == 3  # max_retries is 2
    text = str(caught.value)
    assert server.url in text
    assert "failed 3 times" in text
    assert "status 500" in text
    assert "max_retries" in text


def test_server_that_is_not_there_is_named_when_patience_ends(
    server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    server.fault = lambda path: 503 if path == "/health" else None
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"no vLLM server answers at {server.url}/health"):
        generate(engine, model)
    assert 0.2 < time.monotonic() - started < 2
    assert server.asked == []


def test_server_that_comes_back_in_time_is_waited_for(
    server: FakeServer, tmp_path: Path, model: Any
) -> None:
    engine = make_engine(server, tmp_path, patience_seconds=30)
    up_at = time.monotonic() + 0.5
    server.fault = lambda path: 503 if time.monotonic() < up_at else None
    generate(engine, model)
    assert time.monotonic() >= up_at


def test_prefix_cache_that_is_not_reset_is_a_fault(
    server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    server.resets = False
    with pytest.raises(UserError, match="serve this run alone"):
        generate(engine, model)
    assert server.completions == []


@pytest.mark.parametrize(
    ("status", "remedy"), [(404, "VLLM_SERVER_DEV_MODE=1"), (401, "VLLM_API_KEY"), (400, "Correct")]
)
def test_refusal_is_not_tried_again_and_says_what_to_do(
    status: int, remedy: str, server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    failures = failing(server, "/collective_rpc", 99, status)
    with pytest.raises(UserError, match=remedy):
        generate(engine, model)
    assert len(failures) == 1


def test_server_that_reports_other_log_probs_is_refused_before_it_samples(
    server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    server.config["model_config"]["logprobs_mode"] = "raw_logprobs"
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        generate(engine, model)
    assert server.completions == []


def test_cpu_server_with_a_tied_head_is_refused_unless_it_was_untied(
    server: FakeServer, engine: VLLMServerEngine, tmp_path: Path, model: Any
) -> None:
    server.config["device_config"]["device"] = "cpu"
    with pytest.raises(UserError, match="tie_word_embeddings"):
        generate(engine, model)
    generate(make_engine(server, tmp_path, untied_head=True), model)
    assert len(server.completions) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": None},
        {"logprobs": None},
        {"logprobs": {"token_logprobs": [-1.0]}},
        {"token_ids": []},
    ],
)
def test_answer_without_tokens_or_their_log_probs_is_refused(
    change: dict[str, Any], server: FakeServer, engine: VLLMServerEngine, model: Any
) -> None:
    server.choice = lambda body: {**server.default_choice(body), **change}
    with pytest.raises(UserError, match=r"version 0\.32 or newer"):
        generate(engine, model)


def test_key_is_sent_where_there_is_one(
    server: FakeServer, engine: VLLMServerEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(engine, model)
    assert server.keys == {None}
    server.keys.clear()
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    generate(engine, model)
    assert server.keys == {"Bearer secret"}


def test_one_address_for_all_processes_or_one_for_each(
    server: FakeServer, engine: VLLMServerEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert engine._client().url == server.url  # the one for all
    other = VLLMClient("http://127.0.0.1:9", 1, "NONE")
    engine.clients = [other, *engine.clients]
    assert engine._client().url == server.url  # rank 1 has the second
    engine.clients = [other, other, other]
    with pytest.raises(UserError, match="got 3 addresses for 2 processes"):
        generate(engine, model)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"base_url": "localhost:8000"}, "base_url: got 'localhost:8000'"),
        ({"timeout_seconds": 0}, "timeout_seconds: got 0"),
        ({"max_retries": -1}, "max_retries: got -1"),
        ({"parallel": 0}, "parallel: got 0"),
        ({"transport": "stream"}, "transport: got 'stream'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=f"model.engine.{text}"):
        VLLMServerEngine(**options)


@pytest.mark.parametrize("path", ["/v1/models", "/server_info", "/weight_info"])
@pytest.mark.parametrize("odd", [None, [], "text", {}, {"data": []}, {"vllm_config": None}])
def test_server_of_another_kind_is_told_with_what_it_answered(
    server: FakeServer, engine: VLLMServerEngine, model: Any, path: str, odd: Any
) -> None:
    usual = server.answer
    server.answer = lambda asked, body: odd if asked == path else usual(asked, body)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=f"the answer of http.*{path}.* has no .*vLLM server"):
        generate(engine, model)
