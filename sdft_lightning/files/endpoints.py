"""Servers that are asked over HTTP: their addresses, their keys, and one bounded request."""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from sdft_lightning.errors import UserError, printable

MOST_BYTES = 4 * 2**20  # of a reply, where nothing else is said
LONGEST_TIMEOUT = 86_400.0  # seconds; a timer takes no infinity
_PIECE = 2**16  # bytes read at once
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_KEY_PREFIX = re.compile(r"(sk|pk|rk|hf|gsk|gh[a-z]|github_pat|glpat|xai|nvapi)[-_]|AKIA|AIza|eyJ")
_LONG = 20  # characters from which on letters and digits without a word boundary are a key
_SECRET_QUERY = re.compile(r"key|token|secret|passw|signature|\Asig\Z", re.IGNORECASE)


# The whole option is an address with a password, or with a user where users are keys.
_SECRET_URL = re.compile(
    r"https?://[^\s/?#]+@\S*|[a-z][a-z0-9+.-]*://[^\s/?#@:]*:[^\s/?#]+@\S*", re.IGNORECASE
)
_SECRET_OPTIONS = ("api_key", "api_token", "access_token", "auth_token", "password")


class Reply(NamedTuple):
    """What a server sent.

    Attributes:
        status: Of HTTP.
        headers: Its headers.
        body: Its bytes.
    """

    status: int
    headers: Message
    body: bytes

    @property
    def redirect(self) -> str | None:
        """Where the server sends the request on to, fit for a message; None where it does not."""
        if not 300 <= self.status < 400:
            return None
        return printable(str(self.headers.get("Location", "an address that it does not name")))


class TooLongError(Exception):
    """The reply has more bytes than allowed; asking again would not make it shorter."""


def check_address(option: str, url: str) -> None:
    """Refuse an address that is none, or that holds a secret, without printing it back.

    Args:
        option: Name of the option that holds it.
        url: What was given.

    Raises:
        UserError: Names the option and where a secret belongs.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        secret = "@" in parts.netloc or _names_secret(parts.query)
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError:
        usable, secret = False, False
    if secret:
        raise UserError(
            f"{option}: the address holds a user, a password or a key, and would be written into "
            "configs and messages with it. Leave it out, and put the key into the environment "
            "variable that api_key_variable names."
        )
    if not usable or re.search(r"[\s\\]", url):
        shown = printable(re.sub(r"\S*@", "***@", url))
        raise UserError(
            f"{option}: got {shown!r}, allowed are addresses that begin with http:// or https://, "
            "e.g. http://localhost:8000."
        )


def check_no_secrets(options: object, name: str = "") -> None:
    """Refuse options that hold a secret: they are written into config.yaml and plan.json.

    Args:
        options: Nested options of a command, as mappings, namespaces and lists.
        name: What they are an option of.

    Raises:
        UserError: Names the option, and where the secret belongs; the value is not printed.
    """
    if isinstance(options, Mapping | Namespace):
        for key, value in (options if isinstance(options, Mapping) else vars(options)).items():
            check_no_secrets(value, f"{name}.{key}" if name else str(key))
    elif isinstance(options, list | tuple):
        for place, value in enumerate(options):
            check_no_secrets(value, f"{name}[{place}]")
    elif isinstance(options, str):
        option = name.rpartition(".")[2]
        if option == "api_key_variable":
            check_variable_name(name, options)
        elif option in _SECRET_OPTIONS or _SECRET_URL.fullmatch(options.strip()):
            raise UserError(
                f"{name}: it holds a secret (a key, or user and password in an address; it is not "
                "shown), which would be written into the run's config. Leave it out, and put the "
                "secret into the environment variable that is read for it."
            )


def _names_secret(query: str) -> bool:
    return any(_SECRET_QUERY.search(name) for name, _ in parse_qsl(query, keep_blank_values=True))


def check_variable_name(option: str, name: str) -> None:
    """Refuse what is no name of an environment variable, or looks like the key itself.

    Args:
        option: Name of the option.
        name: What was given; it is not printed back.

    Raises:
        UserError: Says that a name is wanted.
    """
    if _VARIABLE.fullmatch(name) and (name in os.environ or not _looks_like_key(name)):
        return
    raise UserError(
        f"{option}: wants the name of an environment variable, such as OPENAI_API_KEY, and got "
        "something that is none or that looks like the key itself (it is not shown). Put the key "
        "into a variable, and give the variable's name."
    )


def _looks_like_key(name: str) -> bool:
    if _KEY_PREFIX.match(name):
        return True
    words = name.split("_")
    return max(map(len, words)) >= _LONG and any(c.isdigit() for c in name)


def fetch(
    url: str,
    data: bytes | None,
    headers: Mapping[str, str],
    seconds: float,
    most_bytes: int = MOST_BYTES,
    context: ssl.SSLContext | None = None,
) -> Reply:
    """Send one request and read its whole reply, in bounded time and memory.

    Proxies of the environment are used. A redirect is returned and not followed: the key and the
    texts of the request would go to another host.

    Args:
        url: http or https.
        data: Body of a POST; None for a GET.
        headers: Of the request.
        seconds: From here to the last byte of the reply.
        most_bytes: Longest reply.
        context: For https; the system's certificates without it.

    Raises:
        TooLongError: The reply is longer.
        TimeoutError: It is not complete in time, however steadily bytes come.
        OSError: No connection.
        http.client.HTTPException: No HTTP.
    """
    request = urllib.request.Request(url, data, dict(headers))
    with _Deadline(seconds) as deadline:
        # Without the handlers of urlopen: no redirects, no other protocols, no errors by status.
        opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler(), _Opening(deadline, context)):
            opener.add_handler(handler)
        try:
            with opener.open(request, timeout=seconds) as response:
                reply = Reply(response.status, response.headers, _read(response, most_bytes))
        except (OSError, http.client.HTTPException):
            deadline.check()
            raise
        deadline.check()  # a reply without a length seems whole where its connection was cut
        return reply


def _read(response: http.client.HTTPResponse, most: int) -> bytes:
    body = bytearray()
    while piece := response.read(_PIECE):
        body += piece
        if len(body) > most:
            raise TooLongError(f"the reply is longer than {most:,} bytes, which is the limit")
    if response.length:
        raise http.client.IncompleteRead(bytes(body[:0]), response.length)
    return bytes(body)


class _Opening(urllib.request.AbstractHTTPHandler):
    """Opens connections that a deadline watches."""

    def __init__(self, deadline: _Deadline, context: ssl.SSLContext | None) -> None:
        super().__init__()

        class Plain(http.client.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                deadline.watch(self.sock)

        # HTTPSConnection connects by its next class, `Plain`, and then puts TLS upon it.
        class Secure(http.client.HTTPSConnection, Plain):
            pass

        self._plain, self._secure, self._context_of_tls = Plain, Secure, context

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._plain, request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._secure, request, context=self._context_of_tls)


class _Deadline:
    """Cuts connections when time is up: a time-out of the socket begins anew with every byte."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._watched: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        with self._lock:
            for watched in self._watched:
                watched.close()
            self._watched = []

    def watch(self, connection: socket.socket) -> None:
        """Cut this connection, too; TLS may be put upon it meanwhile."""
        with self._lock:
            self._watched.append(connection.dup())
        if time.monotonic() >= self._end:
            self._cut()

    def check(self) -> None:
        """Raise if time is up.

        Raises:
            TimeoutError: It is.
        """
        if time.monotonic() >= self._end:
            raise TimeoutError(f"no whole reply within {self.seconds:g} s") from None

    def _cut(self) -> None:
        with self._lock:
            for watched in self._watched:
                with suppress(OSError):  # the server may have closed it
                    watched.shutdown(socket.SHUT_RDWR)
