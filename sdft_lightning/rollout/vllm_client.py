"""Speaks HTTP with a vLLM server; tells what may pass from what the user must mend."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any

from sdft_lightning.errors import UserError

_MAY_PASS = (408, 425, 429)  # of the statuses below 500


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
        self.url = base_url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"model.engine.base_url: got {base_url!r}, allowed are addresses that begin with "
                "http:// or https://, e.g. http://localhost:8000."
            )
        self.timeout_seconds = timeout_seconds
        self.api_key_variable = api_key_variable

    def get(self, path: str) -> Any:
        """The server's answer, read as JSON; None where it is empty."""
        return self._ask(path, None, self.timeout_seconds)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's answer to a JSON object, read as JSON; None where it is empty."""
        return self._ask(path, body, self.timeout_seconds)

    def is_up(self) -> bool:
        """Whether the server says that it is well, within some seconds."""
        try:
            self._ask("/health", None, min(10.0, self.timeout_seconds))
        except ServerFaultError:
            return False
        return True

    def _ask(self, path: str, body: dict[str, Any] | None, timeout: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data)  # POST where there are data
        request.add_header("Content-Type", "application/json")
        key = os.environ.get(self.api_key_variable)
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                raw = response.read()
            return json.loads(raw) if raw.strip() else None
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            if error.code >= 500 or error.code in _MAY_PASS:
                raise ServerFaultError(f"{path}: status {error.code}: {text}") from error
            raise UserError(self._refused(path, error.code, text)) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            # OSError: no connection, reset, time-out; ValueError: half an answer.
            raise ServerFaultError(f"{path}: {type(error).__name__}: {error}") from error

    def _refused(self, path: str, status: int, text: str) -> str:
        remedy = "Correct what it says."
        if status == 404:
            remedy = (
                "Start it with VLLM_SERVER_DEV_MODE=1 in its environment, which opens the paths "
                "that refresh weights, and with vLLM 0.32 or newer (docs/vllm.md)."
            )
        if status in (401, 403):
            remedy = f"Put its key into the environment variable {self.api_key_variable}."
        return f"model.engine: the server at {self.url} refused {path} ({status}): {text} {remedy}"
