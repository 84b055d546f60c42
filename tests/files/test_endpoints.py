"""One bounded request: time, bytes, redirects; addresses and names of variables."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sdft_lightning.errors import UserError
from sdft_lightning.files.endpoints import TooLongError, check_address, check_variable_name, fetch

pytestmark = pytest.mark.attack


@pytest.fixture
def raw() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Starts a server of one connection that a function talks on; returns its address."""
    listening: list[socket.socket] = []

    def start(talk: Callable[[socket.socket], None]) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                try:
                    talk(connection)
                except OSError:
                    """The client has hung up."""

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in listening:
        server.close()


def drip(before: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(before)
        for _ in range(60):
            connection.sendall(piece)
            time.sleep(0.1)

    return talk


@pytest.mark.parametrize(
    ("before", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (b"", b"H"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "body without length", "chunks", "headers", "status line", "continue"],
)
def test_server_that_drips_is_cut_at_the_total_deadline(
    before: bytes, piece: bytes, raw: Any
) -> None:
    url = raw(drip(before, piece))
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no whole reply within 0\.5 s"):
        fetch(url, None, {}, seconds=0.5)
    assert time.monotonic() - started < 3


def test_tls_handshake_that_drips_is_cut_too(raw: Any) -> None:
    url = raw(drip(b"\x16\x03\x03\x40\x00", b"\x02")).replace("http:", "https:")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        fetch(url, None, {}, seconds=0.5)
    assert time.monotonic() - started < 3


def test_reply_that_does_not_end_is_cut_at_the_limit_of_bytes(raw: Any) -> None:
    sent = []

    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1000):
            sent.append(len(b"x" * 100_000))
            connection.sendall(b"x" * 100_000)

    with pytest.raises(TooLongError, match="longer than 300,000 bytes"):
        fetch(raw(talk), None, {}, seconds=20, most_bytes=300_000)
    assert sum(sent) < 50_000_000


@pytest.mark.parametrize("said", [b"Content-Length: 10\r\n\r\nabc", b"\r\n"])
def test_half_a_reply_is_none_where_its_length_is_known(said: bytes, raw: Any) -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + said)

    if said == b"\r\n":
        assert fetch(raw(talk), None, {}, seconds=5).body == b""
        return
    with pytest.raises(http.client.IncompleteRead):
        fetch(raw(talk), None, {}, seconds=5)


def test_redirect_is_returned_and_nobody_else_is_asked(hostile: Any) -> None:
    hostile.answer = lambda path, body: (
        302,
        {"Location": f"{hostile.url}/stolen\x1b[2J?a=http://u:pw@h"},
        b"",
    )
    reply = fetch(f"{hostile.url}/a", b"{}", {"Authorization": "Bearer k"}, seconds=5)
    assert reply.status == 302
    assert reply.redirect == f"{hostile.url}/stolen [2J?a=http://***@h"
    assert [path for path, _, _ in hostile.asked] == ["/a"]


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter22@host:8000",
        "https://hunter22@host/v1",
        "http://me:p@hunter22@host",
        "me:hunter22@host:8000",
        "ftp://me:hunter22@host",
        "http://host/v1?api_key=hunter22",
        "http://host/v1?access-token=hunter22",
        "http://me:hunter22@[::1",
        "http://me:hunter22@host:port",
        "http://me:hunter22\\@host",
    ],
)
def test_address_with_a_secret_is_refused_and_not_printed_back(url: str) -> None:
    with pytest.raises(UserError, match=r"x\.base_url") as caught:
        check_address("x.base_url", url)
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "host:8000", "http://", "file:///etc/passwd", "http://h:99999", "http://h\r\nX: y"]
)
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="begin with http:// or https://"):
        check_address("x.base_url", url)


@pytest.mark.parametrize(
    "url",
    ["http://localhost:8000", "https://h/v1", "http://[::1]:8000/v1", "http://h?api-version=2"],
)
def test_address_without_a_secret_is_taken(url: str) -> None:
    check_address("x.base_url", url)


@pytest.mark.parametrize(
    "given",
    [
        "sk-proj-abcdefghijklmnop",
        "sk_live_51H8abcdefgh",
        "hf_abcdefGHIJKLmnopqrSTUVWXyz",
        "gsk_0123456789abcdef",
        "a3f4c0d9e8b7a6f5a3f4c0d9e8b7a6f5",
        "AKIAIOSFODNN7EXAMPLE",
        "token with blanks",
        "",
        "3KEY",
        "KEY\n",
    ],
)
def test_key_in_place_of_a_variables_name_is_refused_and_not_printed_back(given: str) -> None:
    with pytest.raises(UserError, match="the name of an environment variable") as caught:
        check_variable_name("x.api_key_variable", given)
    assert not given.strip() or given not in str(caught.value)


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "my_key", "NONE", "KEY_OF_THE_JUDGE_2026_B"])
def test_name_of_a_variable_is_taken_whether_or_not_it_is_set(name: str) -> None:
    check_variable_name("x.api_key_variable", name)


def test_odd_name_is_taken_where_there_is_such_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("hf_key_of_mine", "x")
    check_variable_name("x.api_key_variable", "hf_key_of_mine")
