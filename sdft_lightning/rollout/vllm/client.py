"""Speaks HTTP with a vLLM server; tells what may pass from what the user must mend."""

from __future__ import annotations

import http.client
import json
from typing import Any

from sdft_lightning.errors import UserError, key_from, printable
from sdft_lightning.files.endpoints import (
    MOST_BYTES,
    Reply,
    TooLongError,
    check_address,
    check_variable_name,
    fetch,
)

_MAY_PASS = (408, 425, 429)  # of the statuses below 500
_LOOKED_AT = 2**16  # bytes of a reply that a message is made of
_NO_VLLM = "No vLLM server answers so; correct model.engine.base_url, or look into its log."


class ServerFaultError(Exception):
    """The server could not be reached, did not answer in time, or failed; it may come back."""


class VLLMClient:
    """A vLLM server.

    Args:
        base_url: Its address, with or without /v1 at the end.
        timeout_seconds: Of one request.
        api_key_variable: Environment variable with the key, if the server asks for one.
    """

    def __init__(self, base_url: str, timeout_seconds: float, api_key_variable: str) -> None:
        check_address("model.engine.base_url", base_url)
        check_variable_name("model.engine.api_key_variable", api_key_variable)
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self.timeout_seconds = timeout_seconds
        self.api_key_variable = api_key_variable

    def get(self, path: str) -> Any:
        """The server's answer, read as JSON; None where it is empty."""
        return self._ask(path, None, self.timeout_seconds, MOST_BYTES)

    def post(self, path: str, body: dict[str, Any], most_bytes: int = MOST_BYTES) -> Any:
        """The server's answer to a JSON object, read as JSON; None where it is empty."""
        return self._ask(path, body, self.timeout_seconds, most_bytes)

    def is_up(self) -> bool:
        """Whether the server says that it is well, within some seconds."""
        try:
            self._ask("/health", None, min(10.0, self.timeout_seconds), MOST_BYTES, read=False)
        except ServerFaultError:
            return False
        return True

    def _ask(
        self,
        path: str,
        body: dict[str, Any] | None,
        timeout: float,
        most_bytes: int,
        read: bool = True,
    ) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        key = key_from(self.api_key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            reply = fetch(self.url + path, data, headers, timeout, most_bytes)
        except TooLongError as error:
            raise UserError(f"model.engine: {self.url}{path}: {error}. {_NO_VLLM}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            # OSError: no connection, reset, time-out; ValueError: headers that are none.
            found = printable(str(error))
            raise ServerFaultError(f"{path}: {type(error).__name__}: {found}") from None
        self._check_status(path, reply)
        return _as_json(path, reply.body) if read else None

    def _check_status(self, path: str, reply: Reply) -> None:
        """Refuse what is no success.

        Raises:
            ServerFaultError: It may pass.
            UserError: It will not.
        """
        if 200 <= reply.status < 300:
            return
        if reply.redirect is not None:
            raise UserError(
                f"model.engine: the server at {self.url} sends {path} on to {reply.redirect}. "
                "Redirects are not followed, as the key and the prompts would go there; give the "
                "address of the server itself as model.engine.base_url."
            )
        text = printable(reply.body.decode(errors="replace"))
        if reply.status >= 500 or reply.status in _MAY_PASS:
            raise ServerFaultError(f"{path}: status {reply.status}: {text}")
        raise UserError(self._refused(path, reply.status, text))

    def _refused(self, path: str, status: int, text: str) -> str:
        remedy = "Correct what it says."
        if status == 404:
            remedy = (
                "Start it with VLLM_SERVER_DEV_MODE=1 in its environment, which opens the paths "
                "that refresh weights, and with vLLM 0.32 or newer."
            )
        if status in (401, 403):
            remedy = f"Put its key into the environment variable {self.api_key_variable}."
        return f"model.engine: the server at {self.url} refused {path} ({status}): {text} {remedy}"


def _as_json(path: str, body: bytes) -> Any:
    """A reply read as JSON; None where it is empty.

    Raises:
        ServerFaultError: If it is none, as error pages of proxies are.
    """
    try:
        return json.loads(body) if body.strip() else None
    except (ValueError, RecursionError) as error:
        found = printable(body[:_LOOKED_AT].decode(errors="replace"))
        raise ServerFaultError(
            f"{path}: {type(error).__name__}: no JSON can be read from {found!r}"
        ) from None
