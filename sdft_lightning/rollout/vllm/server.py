"""vLLM as the sampler: a server that the user runs, refreshed before each rollout."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import distributed as dist

from sdft_lightning.errors import UserError, printable, shown
from sdft_lightning.files.endpoints import LONGEST_TIMEOUT
from sdft_lightning.rollout.engine import Sampled, as_rollout, vocabulary_size
from sdft_lightning.rollout.generate import RolloutRequest
from sdft_lightning.rollout.sampling import Sampling
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.rollout.vllm.client import ServerFaultError, VLLMClient
from sdft_lightning.rollout.vllm.engine import (
    FINISH_REASONS,
    ExternalEngine,
    repeated_prompts,
    request_seeds,
)
from sdft_lightning.rollout.vllm.weights import EngineDtype, WeightsFolder, ties_head
from sdft_lightning.types import Rollout

_LONGEST_PAUSE = 10.0  # seconds between two looks whether the server is back
# Of a completion's reply: each token comes as id, text, log-probability and in a list of such.
_BYTES_A_TOKEN, _BYTES_BESIDES = 2048, 2**20
_NEEDS = "Use a vLLM server, version 0.32 or newer."


class VLLMServerEngine(ExternalEngine):
    """Samples from a running vLLM server, which gets each step's weights through a shared folder.

    The server must be started as the documentation's page on vLLM says, and serve this run alone:
    whoever else asks it gets the student of the moment. One that restarts is given the weights
    again.

    Args:
        base_url: Its address, e.g. http://localhost:8000; a list in runs of several processes, one
            server for each.
        model: The name that it serves the model under; asked of the server without it.
        dtype: Of the server's weights: bfloat16, float16 or float32.
        exchange_folder: A folder that trainer and server see under the same path; /dev/shm or the
            system's temporary folder without it, for a server on the same machine.
        timeout_seconds: Of one request, to the last byte of its reply; all tokens of a completion
            must come within it.
        max_retries: How often a rollout is begun again after the server failed in it.
        patience_seconds: How long a server that is down may take to come back each time.
        parallel: Completions asked for at once.
        untied_head: The server was told to load the output head by itself (--hf-overrides
            '{"tie_word_embeddings": false}'), as a server on a CPU must be for models that tie it.
        api_key_variable: Environment variable with the server's key, if it asks for one.
    """

    def __init__(
        self,
        base_url: str | list[str] = "http://localhost:8000",
        model: str | None = None,
        dtype: EngineDtype = "bfloat16",
        exchange_folder: str | None = None,
        timeout_seconds: float = 600.0,
        max_retries: int = 3,
        patience_seconds: float = 600.0,
        parallel: int = 64,
        untied_head: bool = False,
        api_key_variable: str = "VLLM_API_KEY",
    ) -> None:
        limits: dict[str, tuple[float, float]] = {
            "timeout_seconds": (timeout_seconds, 1),
            "max_retries": (max_retries, 0),
            "patience_seconds": (patience_seconds, 0),
            "parallel": (parallel, 1),
        }
        for name, (value, least) in limits.items():
            if not value >= least:
                raise UserError(f"model.engine.{name}: got {value}, allowed are {least} and more.")
        if timeout_seconds > LONGEST_TIMEOUT:
            raise UserError(
                f"model.engine.timeout_seconds: got {timeout_seconds}, allowed are up to "
                f"{LONGEST_TIMEOUT:g} (a day)."
            )
        urls = [base_url] if isinstance(base_url, str) else base_url
        self.clients = [VLLMClient(url, timeout_seconds, api_key_variable) for url in urls]
        self.model = model
        self.max_retries = max_retries
        self.patience_seconds = patience_seconds
        self.parallel = parallel
        self.untied_head = untied_head
        self.folder = WeightsFolder(exchange_folder, dtype)
        # Tells our weights from those of a restarted server, or of another run on the same one.
        self._name = uuid.uuid4().hex
        self._version = 0
        self._checked = False

    def generate(self, student: StudentPasses, request: RolloutRequest) -> Rollout:
        """Refresh the server's weights and sample; begun again if the server fails meanwhile.

        Raises:
            UserError: If it fails too often, or cannot be used.
        """
        client = self._client()
        folder = self.folder.write(student.model, self.untied_head)
        fault: ServerFaultError | None = None
        for _ in range(1 + self.max_retries):
            self._wait(client, fault)
            try:
                self._check_server(client, student.model)
                self.refresh(client, folder)
                sampled = self._sample(client, request)
                self._check_version(client)
                source = f"the vLLM server at {client.url}"
                return as_rollout(sampled, request, vocabulary_size(student.model), source)
            except ServerFaultError as error:
                fault = error
        raise UserError(
            f"model.engine: the vLLM server at {client.url} failed {1 + self.max_retries} times in "
            f"one rollout, the last time with: {fault}. Look into its log, start it again, and go "
            "on with --ckpt_path=last; for slow servers raise model.engine.timeout_seconds or "
            "patience_seconds, for unsteady ones max_retries."
        ) from fault

    def refresh(self, client: VLLMClient, folder: Path) -> None:
        """Let the server load a folder of weights and forget what it computed with the last ones.

        Raises:
            ServerFaultError: If it does not.
        """
        self._version += 1
        kwargs = {"weights_path": str(folder)}
        client.post("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
        answer = client.post("/reset_prefix_cache", {})
        if not (isinstance(answer, dict) and answer.get("success")):
            raise ServerFaultError(
                "/reset_prefix_cache: not done, as other requests are under way; the server must "
                "serve this run alone"
            )
        client.post("/update_weight_version", {"new_version": self._marker})

    def close(self) -> None:
        """Remove the weights that were handed over; the server stays."""
        self.folder.remove()

    @property
    def _marker(self) -> str:
        return f"{self._name}-{self._version}"

    def _client(self) -> VLLMClient:
        several = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        if size != len(self.clients):
            raise UserError(
                f"model.engine.base_url: got {len(self.clients)} addresses for {size} processes; "
                "each process needs a server of its own, as each refreshes its weights. Give a "
                "list with one address for each."
            )
        return self.clients[rank]

    def _wait(self, client: VLLMClient, fault: ServerFaultError | None) -> None:
        """Wait until the server is up.

        Raises:
            UserError: If patience ends first.
        """
        started, pause = time.monotonic(), 0.1
        while not client.is_up():
            if time.monotonic() - started > self.patience_seconds:
                before = "" if fault is None else f" Before that: {fault}."
                raise UserError(
                    f"model.engine: no vLLM server answers at {client.url}/health, waited for "
                    f"{self.patience_seconds:g} s (patience_seconds).{before} Start it as "
                    "the documentation's page on vLLM says, or correct model.engine.base_url; a "
                    "run that had begun goes on with --ckpt_path=last."
                ) from fault
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _check_server(self, client: VLLMClient, student: Any) -> None:
        """Refuse, once, a server that was started otherwise than the engine needs.

        Raises:
            UserError: Names the option of the server.
        """
        if self._checked:
            return
        if self.model is None:
            self.model = _model_name(client)
        mode, device = _found(
            client,
            "/server_info?config_format=json",
            [
                ("vllm_config", "model_config", "logprobs_mode"),
                ("vllm_config", "device_config", "device"),
            ],
        )
        wanted = "processed_logprobs"
        if mode != wanted:
            raise UserError(
                f"model.engine: the server at {client.url} reports "
                f"{printable(str(mode))}; what the trainer "
                f"compares with are log-probabilities as sampled. Start it with --logprobs-mode "
                f"{wanted}."
            )
        if str(device) == "cpu" and ties_head(student) and not self.untied_head:
            raise UserError(
                f"model.engine: the server at {client.url} runs on a CPU, where vLLM does not "
                "refresh an output head that is tied to the embedding. Start it with "
                "--hf-overrides '{\"tie_word_embeddings\": false}' on a folder that has the head "
                "(see the documentation's page on vLLM), and set model.engine.untied_head=true."
            )
        self._checked = True

    def _check_version(self, client: VLLMClient) -> None:
        """Refuse completions of a server that lost our weights while it sampled.

        Raises:
            ServerFaultError: If it restarted, or somebody else gave it weights.
        """
        found = _found(client, "/weight_info", [("weight_version",)])[0]
        if found != self._marker:
            raise ServerFaultError(
                f"/weight_info: the weights are {shown(found)} and no longer "
                f"{self._marker!r}; the server restarted, or another run uses it"
            )

    def _sample(self, client: VLLMClient, request: RolloutRequest) -> list[Sampled]:
        assert self.model is not None
        bodies = [
            completion_body(
                self.model,
                prompt,
                seed,
                replace(request.sampling, max_new_tokens=most),
                request.stop_ids,
            )
            for prompt, seed, most in zip(
                repeated_prompts(request), request_seeds(request), request.limits, strict=True
            )
        ]

        def ask(body: dict[str, Any]) -> Sampled:
            tokens = len(body["prompt"]) + body["max_tokens"]
            most = _BYTES_BESIDES + _BYTES_A_TOKEN * tokens
            return read_completion(client.post("/v1/completions", body, most), client.url)

        with ThreadPoolExecutor(min(self.parallel, len(bodies))) as pool:
            return list(pool.map(ask, bodies))


def _model_name(client: VLLMClient) -> str:
    found = _found(client, "/v1/models", [("data", 0, "id")])[0]
    if not isinstance(found, str) or not found:
        raise UserError(
            f"model.engine: {client.url}/v1/models names a model {shown(found)}, which "
            f"is no name. {_NEEDS}"
        )
    return found


def _found(client: VLLMClient, path: str, wanted: list[tuple[str | int, ...]]) -> list[Any]:
    """What stands under each sequence of keys in a server's answer.

    Raises:
        UserError: If it answers in another form, as no vLLM server does.
    """
    answer = client.get(path)
    return [_under(answer, keys, f"{client.url}{path}") for keys in wanted]


def _under(answer: Any, keys: tuple[str | int, ...], url: str) -> Any:
    found = answer
    try:
        for key in keys:
            found = found[key]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"model.engine: the answer of {url} has no {'.'.join(map(str, keys))}, got "
            f"{shown(answer)}. {_NEEDS}"
        ) from error
    return found


def completion_body(
    model: str, prompt: list[int], seed: int, sampling: Sampling, stop_ids: list[int]
) -> dict[str, Any]:
    """A request for one completion, in token ids.

    All that a server may have defaults of its own for is given, so that none is used.

    Args:
        model: Name of the model at the server.
        prompt: Token ids.
        seed: Of this completion.
        sampling: Temperature, truncation, length.
        stop_ids: Ids that end it.
    """
    return {
        "model": model,
        "prompt": prompt,
        "n": 1,
        "seed": seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": stop_ids,
        "ignore_eos": True,  # ours are the only stop ids
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,  # text would not always give the same tokens back
    }


def read_completion(answer: Any, url: str) -> Sampled:
    """The completion in a server's answer.

    Args:
        answer: Its JSON.
        url: The server, for the message.

    Raises:
        UserError: If the server does not say which tokens it sampled, with their log-probabilities.
        ServerFaultError: If the completion was aborted.
    """
    try:
        (choice,) = answer["choices"]
        ids, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason = choice["finish_reason"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"model.engine: the answer of {url} is not one choice with token ids, their "
            f"log-probabilities and a finish reason ({type(error).__name__}: {error}), got "
            f"{shown(answer)}. {_NEEDS}"
        ) from error
    if not isinstance(ids, list) or not isinstance(log_probs, list):
        raise UserError(
            f"model.engine: the answer of {url} lacks the list of token ids or of their "
            f"log-probabilities, got {shown(choice)}. {_NEEDS}"
        )
    if reason not in FINISH_REASONS:
        raise ServerFaultError(
            f"/v1/completions: a completion ended for the reason {shown(reason)}, "
            f"allowed are {', '.join(FINISH_REASONS)}"
        )
    return Sampled(ids, log_probs, reason == "stop")
