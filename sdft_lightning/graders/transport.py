"""How the judge's client reaches its endpoint: one bounded request at a time, no redirects."""

from __future__ import annotations

import http.client

import httpx2
import openai

from sdft_lightning.errors import printable
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
