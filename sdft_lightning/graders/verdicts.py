"""Requests to a judge's endpoint, bounded, and verdicts on disk that processes share."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai

from sdft_lightning.errors import mask, printable
from sdft_lightning.files.endpoints import TooLongError, fetch

# Set for each request by `fetch`; a compressed reply could grow without bound.
_NOT_PASSED_ON = ("host", "content-length", "connection", "accept-encoding", "transfer-encoding")
_READ_BY_THE_CLIENT = ("content-type", "retry-after", "retry-after-ms", "x-should-retry")


class BoundedTransport(httpx2.BaseTransport):
    """Sends the requests of an openai client through `fetch`.

    Args:
        seconds: From the request to the last byte of its reply.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._context = httpx2.create_ssl_context()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request.

        Raises:
            openai.OpenAIError: The reply is too long or a redirect; it is not asked for again.
            httpx2.RequestError: No reply, or none in time; the client tries again.
        """
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in _NOT_PASSED_ON
        }
        try:
            reply = fetch(
                str(request.url),
                request.read(),
                {**headers, "Accept-Encoding": "identity"},
                self.seconds,
                context=self._context,
            )
        except TooLongError as error:
            raise openai.OpenAIError(str(error)) from None
        except TimeoutError as error:
            raise httpx2.ReadTimeout(str(error), request=request) from None
        except (OSError, http.client.HTTPException) as error:
            found = f"{type(error).__name__}: {printable(str(error))}"
            raise httpx2.ConnectError(found, request=request) from None
        if reply.redirect is not None:
            raise openai.OpenAIError(
                f"the endpoint sends the request on to {reply.redirect}. Redirects are not "
                "followed, as the key and the answers would go there; give the address of the "
                "endpoint itself as data.judge.base_url"
            )
        kept = [
            (name, reply.headers[name]) for name in _READ_BY_THE_CLIENT if name in reply.headers
        ]
        return httpx2.Response(reply.status, headers=kept, content=reply.body, request=request)


_MOST_BYTES = 2**24  # of a file that `put` has written; replies are shorter


class VerdictCache:
    """Replies of a judge by what was asked.

    Args:
        folder: Where they are kept; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, request: dict[str, Any]) -> str | None:
        """The reply to an equal request, or None; a damaged file counts as none."""
        path = self._path(request)
        try:
            if not path.is_file() or path.stat().st_size > _MOST_BYTES:
                return None
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        reply = found.get("reply") if isinstance(found, dict) else None
        return reply if isinstance(reply, str) else None

    def put(self, request: dict[str, Any], reply: str) -> str:
        """Keep a reply, known secrets masked; the file holds the request too, to be read by people.

        Returns:
            Why it could not be kept; empty where it was.
        """
        entry = {"request": request, "reply": mask(reply)}
        text = json.dumps(entry, ensure_ascii=False, indent=1)
        raw = text.encode("utf-8", "backslashreplace")  # half a character becomes JSON's \\ud800
        partial: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
            os.replace(partial, self._path(request))
        except OSError as error:
            if partial is not None:
                with suppress(OSError):
                    os.unlink(partial)
            return (
                f"{self.folder}: {printable(str(error.strerror))}. Make room there, or name "
                "another folder as data.judge.cache."
            )
        return ""

    def _path(self, request: dict[str, Any]) -> Path:
        text = json.dumps(request, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
