"""A server on this machine that sends whatever bytes a test wants, as slowly as it wants."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


def as_json(value: Any, status: int = 200) -> Answer:
    """An answer of JSON; texts go through as they are."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return status, {"Content-Type": "application/json"}, raw


class HostileServer:
    """Answers each request by a function of its path and body.

    Attributes:
        url: Its address.
        answer: From path (without query) and JSON body to status, headers and body.
        asked: Path, headers and body of each request.
        drips: Paths whose body comes byte by byte, for up to 20 s, and never whole.
    """

    def __init__(self) -> None:
        self.answer: Callable[[str, Any], Answer] = lambda path, body: as_json({})
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.drips: set[str] = set()
        hostile = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                self.reply(json.loads(raw))

            def reply(self, body: Any) -> None:
                path = self.path.partition("?")[0]
                hostile.asked.append((path, dict(self.headers), body))
                if path in hostile.drips:
                    self.drip()
                    return
                status, headers, raw = hostile.answer(path, body)
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:
                    """The client has hung up, as it should on a reply that is too long."""

            def drip(self) -> None:
                try:
                    self.send_response(200)
                    self.end_headers()
                    for _ in range(100):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                        time.sleep(0.2)
                except OSError:
                    """The client has hung up."""

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def running() -> Iterator[HostileServer]:
    """One that runs while the generator is held."""
    found = HostileServer()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()
