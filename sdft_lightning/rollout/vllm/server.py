"""vLLM as the sampler: a server that the user runs, refreshed before each rollout."""

from __future__ import annotations

import contextlib
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import distributed as dist

from sdft_lightning.errors import UserError, check_choice, printable, shown
from sdft_lightning.files.endpoints import LONGEST_TIMEOUT
from sdft_lightning.models.sharding import is_sharded
from sdft_lightning.rollout.engine import Sampled, as_rollout, vocabulary_size
from sdft_lightning.rollout.generate import RolloutRequest
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.rollout.vllm.client import (
    LOAD_ADAPTER,
    ServerFaultError,
    VLLMClient,
    completion_body,
    found_at,
    model_name,
    on_rank_zero,
    own_rank,
    read_completion,
    several,
    together,
    under,
)
from sdft_lightning.rollout.vllm.engine import ExternalEngine, repeated_prompts, request_seeds
from sdft_lightning.rollout.vllm.transfer import TRANSFERS, Transfer, transfer_problem
from sdft_lightning.rollout.vllm.weights import (
    EngineDtype,
    Form,
    WeightsFolder,
    check_adapters,
    ties_head,
    vllm_rank,
)
from sdft_lightning.types import Rollout

Transport = Literal["auto", "nccl", "ipc", "folder", "adapters"]
_LONGEST_PAUSE = 10.0  # seconds between two looks whether the server is back
# Of a completion's reply: each token comes as id, text, log-probability and in a list of such.
_BYTES_A_TOKEN, _BYTES_BESIDES = 2048, 2**20


class Way(NamedTuple):
    """How a server gets the weights.

    Attributes:
        whole: nccl, ipc or folder: how whole weights come to it.
        adapters: Whether adapters come to it as such, after the base model's weights.
        model: The name that its model goes by.
    """

    whole: str
    adapters: bool
    model: str


class VLLMServerEngine(ExternalEngine):
    """Samples from running vLLM servers, which get each step's weights.

    A server must be started as the documentation's page on vLLM says, and serve this run alone:
    whoever else asks it gets the student of the moment. One that restarts is given the weights
    again.

    Args:
        base_url: Its address, e.g. http://localhost:8000: one server for all processes, or a list
            of one for each.
        model: The name that it serves the model under; asked of the server without it.
        dtype: Of the server's weights: bfloat16, float16 or float32.
        transport: How weights are handed over. nccl or ipc: by vLLM's own transfer between GPUs,
            or inside one, for a server that was started with that backend
            (--weight-transfer-config) and a trainer that has vllm installed; folder: through a
            folder that both see; adapters: the adapters alone, after the base model's weights once,
            for a server with --enable-lora. auto: adapters where the server takes them, else the
            server's backend, else folder.
        exchange_folder: A folder that trainer and server see under the same path; /dev/shm or the
            system's temporary folder without it, for a server on the same machine.
        timeout_seconds: Of one request, to the last byte of its reply; all tokens of a completion
            must come within it.
        max_retries: How often a rollout is begun again after the server failed in it.
        patience_seconds: How long a server that is down may take to come back each time.
        parallel: Completions asked for at once, by each process.
        untied_head: The server was told to load the output head by itself (--hf-overrides
            '{"tie_word_embeddings": false}'), as a server on a CPU must be for models that tie it.
        api_key_variable: Environment variable with the server's key, if it asks for one.
    """

    takes_shards: ClassVar[bool] = True

    def __init__(
        self,
        base_url: str | list[str] = "http://localhost:8000",
        model: str | None = None,
        dtype: EngineDtype = "bfloat16",
        transport: Transport = "auto",
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
        check_choice("model.engine.transport", transport, get_args(Transport))
        urls = [base_url] if isinstance(base_url, str) else base_url
        self.clients = [VLLMClient(url, timeout_seconds, api_key_variable) for url in urls]
        self.model = model
        self.dtype: EngineDtype = dtype
        self.transport = transport
        self.max_retries = max_retries
        self.patience_seconds = patience_seconds
        self.parallel = parallel
        self.untied_head = untied_head
        self.folder, self.adapters = WeightsFolder(exchange_folder), WeightsFolder(exchange_folder)
        # Tells our weights from those of a restarted server, or of another run on the same one.
        self._name = f"sdft-{uuid.uuid4().hex}"
        self._version = 0
        self._ways: dict[str, Way] = {}
        self._given: dict[str, str] = {}  # to which server, which version
        self._written: dict[bool, Path] = {}  # folders of this rollout, adapters merged or not
        self._transfers: dict[str, Transfer] = {}

    def generate(self, student: StudentPasses, request: RolloutRequest) -> Rollout:
        """Refresh the server's weights and sample; begun again if the server fails meanwhile.

        All processes do so at the same time, and begin again together.

        Raises:
            UserError: If it fails too often, or cannot be used.
        """
        client = self._client()
        fault: ServerFaultError | None = None
        self._written = {}
        for _ in range(1 + self.max_retries):
            try:
                self.refresh(student.model, fault)
                return together(lambda: self._rollout(client, student.model, request))
            except ServerFaultError as error:
                fault = error
                self._end_transfers()
        raise UserError(
            f"model.engine: the vLLM server at {client.url} failed {1 + self.max_retries} times in "
            f"one rollout, the last time with: {fault}. Look into its log, start it again, and go "
            "on with --ckpt_path=last; for slow servers raise model.engine.timeout_seconds or "
            "patience_seconds, for unsteady ones max_retries."
        ) from fault

    def refresh(self, student: Any, fault: ServerFaultError | None = None) -> None:
        """Give the servers the present weights, and let them forget what the last ones computed.

        Args:
            student: The trained model.
            fault: Why it is tried again.

        Raises:
            ServerFaultError: If a server does not take them.
            UserError: If one does not answer, or cannot be used.
        """
        lost, self._ways, self._name = on_rank_zero(lambda: self._prepare(student, fault))
        self._version += 1
        form = Form(getattr(torch, self.dtype), self.untied_head)
        for client in self.clients:
            way = self._ways[client.url]
            mine = form._replace(merge=not way.adapters)
            if not way.adapters or lost[client.url]:
                if way.whole == "folder":
                    if mine.merge not in self._written:
                        self._written[mine.merge] = self.folder.write(student, mine)
                    self._load_folder(client, self._written[mine.merge])
                else:
                    self._transfer(client, student, mine, way, lost[client.url])
        if any(way.adapters for way in self._ways.values()):
            folder = self.adapters.write_adapters(student, form.dtype)
            on_rank_zero(lambda: self._load_adapters(folder))
        on_rank_zero(self._commit)

    def close(self) -> None:
        """Remove what was handed over; the server stays."""
        self._end_transfers()
        for client in self.clients:
            if client.url in self._given and self._ways[client.url].adapters and own_rank() == 0:
                with contextlib.suppress(ServerFaultError, UserError):
                    client.post("/v1/unload_lora_adapter", {"lora_name": self._name}, read=False)
        self._given, self._written = {}, {}
        self.folder.remove()
        self.adapters.remove()

    @property
    def _marker(self) -> str:
        return f"{self._name}-{self._version}"

    def _client(self) -> VLLMClient:
        size = dist.get_world_size() if several() else 1
        if len(self.clients) not in (1, size):
            raise UserError(
                f"model.engine.base_url: got {len(self.clients)} addresses for {size} processes; "
                "allowed are one server for all, or a list of one for each."
            )
        return self.clients[own_rank() if len(self.clients) > 1 else 0]

    # --- on rank zero: is the server there, and the right one? -----------------------------------

    def _prepare(
        self, student: Any, fault: ServerFaultError | None
    ) -> tuple[dict[str, bool], dict[str, Way], str]:
        """Wait for the servers and look at them.

        Returns:
            By address, whether the server has lost what it was given, and how it gets weights; and
            the name that all processes know the weights by.
        """
        lost, ways = {}, dict(self._ways)
        for client in self.clients:
            self._wait(client, fault)
            if client.url not in ways:
                ways[client.url] = self._check_server(client, student)
            way, given = ways[client.url], self._given.pop(client.url, None)
            lost[client.url] = given is None
            if given is not None and (way.adapters or way.whole != "folder"):
                lost[client.url] = given != found_at(client, "/weight_info", ("weight_version",))
        return lost, ways, self._name

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

    def _check_server(self, client: VLLMClient, student: Any) -> Way:
        """Refuse, once, a server that was started otherwise than the engine needs.

        Raises:
            UserError: Names the option of the server.
        """
        model = self.model or model_name(client)
        path = "/server_info?config_format=json"
        answer = client.get(path)
        mode = under(answer, ("vllm_config", "model_config", "logprobs_mode"), client.url + path)
        device = under(answer, ("vllm_config", "device_config", "device"), client.url + path)
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
        config = answer["vllm_config"]
        return Way(
            self._whole(client, student, _part(config, "weight_transfer_config", "backend")),
            self._takes_adapters(client, student, _part(config, "lora_config", "max_lora_rank")),
            model,
        )

    def _whole(self, client: VLLMClient, student: Any, backend: Any) -> str:
        """How whole weights come to a server that was started with a backend, or with none."""
        if self.transport in TRANSFERS:
            if backend != self.transport:
                raise UserError(
                    f"model.engine.transport: got {self.transport}, but the server at {client.url} "
                    f"was started for {shown(backend)}. Start it with --weight-transfer-config "
                    f'\'{{"backend": "{self.transport}"}}\', or give transport: folder.'
                )
            problem = transfer_problem(self.transport, student)
            if problem:
                raise UserError(
                    f"model.engine.transport: got {self.transport}, {problem} Give transport: "
                    "folder."
                )
            return self.transport
        if self.transport == "folder" or backend not in TRANSFERS:
            return "folder"
        return "folder" if transfer_problem(backend, student) else str(backend)

    def _takes_adapters(self, client: VLLMClient, student: Any, most: Any) -> bool:
        """Whether adapters go to a server as such, which takes them up to a rank, or none."""
        if self.transport == "adapters":
            check_adapters(student)
        rank = vllm_rank(student)
        if rank is None or self.transport not in ("auto", "adapters"):
            return False
        if isinstance(most, int) and most >= rank:
            return True
        if self.transport == "auto":
            return False
        raise UserError(
            f"model.engine.transport: got adapters, but the server at {client.url} takes "
            f"{'none' if most is None else f'those of rank {shown(most)} and less'}. Start it with "
            f"--enable-lora --max-lora-rank {rank} and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its "
            "environment."
        )

    # --- handing over ----------------------------------------------------------------------------

    def _load_folder(self, client: VLLMClient, folder: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        on_rank_zero(lambda: client.post("/collective_rpc", body))

    def _transfer(self, client: VLLMClient, student: Any, form: Form, way: Way, lost: bool) -> None:
        known = self._transfers.get(client.url)
        if known is not None and (lost or known.student is not student):
            self._transfers.pop(client.url).close()
        takes_part = own_rank() == 0 or is_sharded(student)  # else rank zero has all there is

        def connect() -> None:
            if takes_part and client.url not in self._transfers:
                transfer = Transfer(way.whole, client, student, form, own_rank())
                self._transfers[client.url] = transfer

        def send() -> None:
            if takes_part:
                self._transfers[client.url].send()

        # First all are connected, so that nobody gathers for one who is not.
        together(connect)
        together(send)

    def _end_transfers(self) -> None:
        for transfer in self._transfers.values():
            transfer.close()
        self._transfers = {}

    def _load_adapters(self, folder: Path) -> None:
        for client in self.clients:
            if self._ways[client.url].adapters:
                body = {"lora_name": self._name, "lora_path": str(folder), "load_inplace": True}
                client.post(LOAD_ADAPTER, body, read=False)

    def _commit(self) -> None:
        """Let the servers drop keys and values of the last weights, and say which they have now."""
        for client in self.clients:
            answer = client.post("/reset_prefix_cache", {})
            if not (isinstance(answer, dict) and answer.get("success")):
                raise ServerFaultError(
                    "/reset_prefix_cache: not done, as other requests are under way; the server "
                    "must serve this run alone"
                )
            client.post("/update_weight_version", {"new_version": self._marker})
            self._given[client.url] = self._marker

    # --- sampling --------------------------------------------------------------------------------

    def _rollout(self, client: VLLMClient, student: Any, request: RolloutRequest) -> Rollout:
        sampled = self._sample(client, request)
        # A server that lost our weights while it sampled: restarted, or given others'.
        found = found_at(client, "/weight_info", ("weight_version",))
        if found != self._marker:
            raise ServerFaultError(
                f"/weight_info: the weights are {shown(found)} and no longer "
                f"{self._marker!r}; the server restarted, or another run uses it"
            )
        source = f"the vLLM server at {client.url}"
        return as_rollout(sampled, request, vocabulary_size(student), source)

    def _sample(self, client: VLLMClient, request: RolloutRequest) -> list[Sampled]:
        way = self._ways[client.url]
        bodies = [
            completion_body(
                self._name if way.adapters else way.model,
                prompt,
                seed,
                replace(request.sampling, max_new_tokens=most),
                request.stop_ids,
            )
            for prompt, seed, most in zip(
                repeated_prompts(request), request_seeds(request), request.limits, strict=True
            )
        ]

        # A server that has restarted does not know the adapters any longer.
        may_pass = (404,) if way.adapters else ()

        def ask(body: dict[str, Any]) -> Sampled:
            tokens = len(body["prompt"]) + body["max_tokens"]
            most = _BYTES_BESIDES + _BYTES_A_TOKEN * tokens
            answer = client.post("/v1/completions", body, most, may_pass=may_pass)
            return read_completion(answer, client.url)

        with ThreadPoolExecutor(min(self.parallel, len(bodies))) as pool:
            return list(pool.map(ask, bodies))


def _part(config: Any, part: str, key: str) -> Any:
    """A value of a server's config; None where it has no such part."""
    found = config.get(part) if isinstance(config, dict) else None
    return found.get(key) if isinstance(found, dict) else None
