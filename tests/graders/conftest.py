"""A server that speaks as an OpenAI-compatible endpoint does, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Endpoint:
    """An endpoint on this machine.

    Attributes:
        url: Its base URL.
        requests: Bodies of the requests, as they came.
        keys: Authorization headers of the same requests.
        reply: From a body to the judge's text, to the number of an HTTP error, or to the bytes of
            the whole answer.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.reply: Callable[[dict[str, Any]], str | int | bytes] = lambda _body: verdict("correct")
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.keys.append(self.headers.get("Authorization"))
                reply = endpoint.reply(body) if self.path.endswith("/chat/completions") else 404
                answer = (
                    {"error": {"message": "no"}} if isinstance(reply, int) else _wrap(str(reply))
                )
                raw = reply if isinstance(reply, bytes) else json.dumps(answer).encode()
                self.send_response(reply if isinstance(reply, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.send_header("retry-after-ms", "1")  # or the client would wait for a second
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def verdict(name: str) -> str:
    """A reply as it is asked for."""
    return json.dumps({"reason": "Because.", "verdict": name})


def _wrap(text: str) -> dict[str, Any]:
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [choice],
        "usage": usage,
    }


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A running endpoint; no key is in the environment."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = Endpoint()
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()
