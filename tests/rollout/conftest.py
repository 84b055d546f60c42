"""A local server that answers as vLLM's does, for all tests of `VLLMServerEngine`."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

NAME = "model.layers.0.mlp.down_proj.weight"


class RefusedError(Exception):
    """What the server answers with status 500."""


class FakeServer:
    """A vLLM server whose model is a single weight.

    Weights come through a folder, by vLLM's transfer (whose tensors come by `wire` instead of
    NCCL), or as adapters.

    Attributes:
        asked: Paths of the requests but /health, in order.
        completions: Bodies of the requests for completions.
        fault: Called with each path; what it returns is sent as the status instead of an answer.
        choice: From a body to the `choices` entry of the answer.
        wire: Puts tensors of a sender on their way; None ends them.
        expected: Names, shapes and dtypes that a transfer must bring, all of them.
        received: What the last transfer has brought.
        loaded: Folder of the adapters by the name of each.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.completions: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.version, self.weight = "default", 0.0
        self.config = {
            "model_config": {"logprobs_mode": "processed_logprobs"},
            "device_config": {"device": "cuda"},
        }
        self.resets = True
        self.wire: queue.Queue[Any] = queue.Queue()
        self.expected: dict[str, tuple[list[int], str]] = {}
        self.received: dict[str, Any] = {}
        self.phase = "none"  # of a transfer: none, idle, started, received
        self.loaded: dict[str, Path] = {}
        self.fault: Callable[[str], int | None] = lambda path: None
        self.choice: Callable[[dict[str, Any]], dict[str, Any]] = self.default_choice
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({})

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: dict[str, Any]) -> None:
                path = self.path.partition("?")[0]
                fake.keys.add(self.headers.get("Authorization"))
                if path != "/health":
                    fake.asked.append(path)
                status = fake.fault(path)
                if status == 0:  # hang up without a word
                    return
                try:
                    answer = {"error": "no"} if status else fake.answer(path, body)
                except RefusedError as error:
                    status, answer = 500, {"error": str(error)}
                raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                raw = b"" if answer is None else raw
                self.send_response(status or 200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "student"}]}
        if path == "/server_info":
            return {"vllm_config": self.config}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            folder = Path(body["kwargs"]["weights_path"])
            self.weight = float(load_file(folder / "model.safetensors")[NAME][0, 0])
            return {"results": [None]}
        if path in self.TRANSFER:
            return self.transfer(path, body)
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.loaded and not body["load_inplace"]:
                raise RefusedError("has already been loaded")
            self.loaded[body["lora_name"]] = Path(body["lora_path"])
            (file,) = Path(body["lora_path"]).glob("*.safetensors")
            self.weight = float(sum(each.sum() for each in load_file(file).values()))
            return b"Success: this is no JSON"
        if path == "/v1/unload_lora_adapter":
            del self.loaded[body["lora_name"]]
            return b"Success"
        if path == "/get_world_size":
            return {"world_size": 4}
        if path == "/reset_prefix_cache":
            return {"success": self.resets}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/v1/completions":
            self.completions.append(body)
            return {"choices": [self.choice(body)]}
        return None

    TRANSFER = (
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
    )

    def transfer(self, path: str, body: dict[str, Any]) -> Any:
        """A step of vLLM's protocol, refused out of order and where something is missing."""
        before = dict(zip(self.TRANSFER, ("any", "idle", "started", "received"), strict=True))
        if before[path] not in ("any", self.phase):
            raise RefusedError(f"{path} while the transfer is {self.phase}")
        if path == "/init_weight_transfer_engine":
            assert body["init_info"]["world_size"] == 5
            self.phase = "idle"
        elif path == "/start_weight_update":
            self.phase = "started"
        elif path == "/update_weights":
            self.receive(**body["update_info"])
            self.phase = "received"
        else:
            missing = set(self.expected) - set(self.received)
            if missing:
                raise RefusedError(f"never sent: {sorted(missing)}")
            self.weight = float(self.received[NAME][0, 0])
            self.phase = "idle"
        return {"message": "done"}

    def receive(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> None:
        """Take as many tensors from the wire as were named, each as it was named."""
        self.received = {}
        for name, dtype, shape in zip(names, dtype_names, shapes, strict=True):
            sent, tensor = self.wire.get(timeout=5)
            found = sent, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            if found != (name, shape, dtype):
                raise RefusedError(f"{found} came where {(name, shape, dtype)} was named")
            if self.expected.get(name) != (shape, dtype):
                raise RefusedError(f"no such weight: {name} {shape} {dtype}")
            self.received[name] = tensor.clone()

    def default_choice(self, body: dict[str, Any]) -> dict[str, Any]:
        """The prompt's length as a token, then the stop token; a log-prob tells the weight."""
        ids = [len(body["prompt"]), 2]
        log_probs = {"token_logprobs": [-abs(self.weight), -0.25]}
        return {"token_ids": ids, "logprobs": log_probs, "finish_reason": "stop", "text": "?"}

    def restart(self) -> None:
        """Lose the weights, the connection and the adapters."""
        self.version, self.weight, self.phase = "default", 0.0, "none"
        self.loaded, self.wire = {}, queue.Queue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A running server; no key is in the environment, and nobody pauses."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    found = FakeServer()
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()
