"""Speaks HTTP with a vLLM server; tells what may pass from what the user must mend.

Several processes hear the same of a server, so that all go on, or begin again, together.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import distributed as dist

from sdft_lightning.errors import UserError, key_from, printable, shown
from sdft_lightning.files.endpoints import (
    MOST_BYTES,
    Reply,
    TooLongError,
    check_address,
    check_variable_name,
    fetch,
)
from sdft_lightning.rollout.engine import Sampled
from sdft_lightning.rollout.sampling import Sampling

T = TypeVar("T")
LOAD_ADAPTER = "/v1/load_lora_adapter"
_MAY_PASS = (408, 425, 429)  # of the statuses below 500
_LOOKED_AT = 2**16  # bytes of a reply that a message is made of
FINISH_REASONS = ("stop", "length")  # of a whole completion; vLLM also aborts
_NEEDS = "Use a vLLM server, version 0.32 or newer."
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

    def post(
        self,
        path: str,
        body: dict[str, Any],
        most_bytes: int = MOST_BYTES,
        read: bool = True,
        may_pass: tuple[int, ...] = (),
    ) -> Any:
        """The server's answer to a JSON object, read as JSON; None where it is empty.

        Args:
            path: Where it is sent.
            body: The object.
            most_bytes: Of the answer.
            read: False takes any answer of success.
            may_pass: Statuses that are faults here, beside the usual ones.
        """
        return self._ask(path, body, self.timeout_seconds, most_bytes, read, may_pass)

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
        may_pass: tuple[int, ...] = (),
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
        self._check_status(path, reply, may_pass)
        return _as_json(path, reply.body) if read else None

    def _check_status(self, path: str, reply: Reply, may_pass: tuple[int, ...]) -> None:
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
        if reply.status >= 500 or reply.status in (*_MAY_PASS, *may_pass):
            raise ServerFaultError(f"{path}: status {reply.status}: {text}")
        raise UserError(self._refused(path, reply.status, text))

    def _refused(self, path: str, status: int, text: str) -> str:
        remedy = "Correct what it says."
        if status == 404:
            remedy = (
                "Start it with VLLM_SERVER_DEV_MODE=1 in its environment, which opens the paths "
                "that refresh weights, and with vLLM 0.32 or newer."
            )
        if path == LOAD_ADAPTER:
            remedy = (
                "Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and with "
                "--enable-lora, or give --model.engine.transport=folder."
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


# --- what is asked for, and what comes back -------------------------------------------------------


def model_name(client: VLLMClient) -> str:
    """Under which name a server serves its model.

    Raises:
        UserError: If it names none.
    """
    found = found_at(client, "/v1/models", ("data", 0, "id"))
    if not isinstance(found, str) or not found:
        raise UserError(
            f"model.engine: {client.url}/v1/models names a model {shown(found)}, which "
            f"is no name. {_NEEDS}"
        )
    return found


def found_at(client: VLLMClient, path: str, keys: tuple[str | int, ...]) -> Any:
    """What stands under a sequence of keys in a server's answer.

    Raises:
        UserError: If it answers in another form, as no vLLM server does.
    """
    return under(client.get(path), keys, f"{client.url}{path}")


def under(answer: Any, keys: tuple[str | int, ...], url: str) -> Any:
    """What stands under a sequence of keys.

    Args:
        answer: JSON of a server.
        keys: Of objects and lists, from the outermost on.
        url: Where it comes from, for the message.

    Raises:
        UserError: If there is no such thing.
    """
    found = answer
    try:
        for key in keys:
            found = found[key]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"model.engine: the answer of {url} has no {'.'.join(map(str, keys))}, got "
            f"{shown(answer)}. {_NEEDS}"
        ) from error
    return found


def completion_body(
    model: str, prompt: list[int], seed: int, sampling: Sampling, stop_ids: list[int]
) -> dict[str, Any]:
    """A request for one completion, in token ids.

    All that a server may have defaults of its own for is given, so that none is used.

    Args:
        model: Name of the model at the server.
        prompt: Token ids.
        seed: Of this completion.
        sampling: Temperature, truncation, length.
        stop_ids: Ids that end it.
    """
    return {
        "model": model,
        "prompt": prompt,
        "n": 1,
        "seed": seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": stop_ids,
        "ignore_eos": True,  # ours are the only stop ids
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,  # text would not always give the same tokens back
    }


def read_completion(answer: Any, url: str) -> Sampled:
    """The completion in a server's answer.

    Args:
        answer: Its JSON.
        url: The server, for the message.

    Raises:
        UserError: If the server does not say which tokens it sampled, with their log-probabilities.
        ServerFaultError: If the completion was aborted.
    """
    try:
        (choice,) = answer["choices"]
        ids, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason = choice["finish_reason"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"model.engine: the answer of {url} is not one choice with token ids, their "
            f"log-probabilities and a finish reason ({type(error).__name__}: {error}), got "
            f"{shown(answer)}. {_NEEDS}"
        ) from error
    if not isinstance(ids, list) or not isinstance(log_probs, list):
        raise UserError(
            f"model.engine: the answer of {url} lacks the list of token ids or of their "
            f"log-probabilities, got {shown(choice)}. {_NEEDS}"
        )
    if reason not in FINISH_REASONS:
        raise ServerFaultError(
            f"/v1/completions: a completion ended for the reason {shown(reason)}, "
            f"allowed are {', '.join(FINISH_REASONS)}"
        )
    return Sampled(ids, log_probs, reason == "stop")


# --- several processes ----------------------------------------------------------------------------


def several() -> bool:
    """Whether the run has several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if several() else 0


def on_rank_zero(work: Callable[[], T]) -> T:
    """What rank zero makes of it; its error is raised on all processes.

    Raises:
        ServerFaultError: If rank zero did.
        UserError: If rank zero did.
    """
    if not several():
        return work()
    found = _attempt(work) if own_rank() == 0 else [None, None]
    dist.broadcast_object_list(found, src=0)
    _raise_first([found[1]])
    return cast(T, found[0])


def together(work: Callable[[], T]) -> T:
    """What this process makes of it, after all have done so; an error of one is raised on all.

    Raises:
        ServerFaultError: If one did.
        UserError: If one did.
    """
    if not several():
        return work()
    result, error = _attempt(work)
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    _raise_first(errors)
    return cast(T, result)


def _attempt(work: Callable[[], Any]) -> list[Any]:
    """Result and error; other errors than those of servers and users end the process."""
    try:
        return [work(), None]
    except (ServerFaultError, UserError) as error:
        return [None, (type(error), str(error))]


def _raise_first(errors: list[tuple[type[Exception], str] | None]) -> None:
    """Raise an error if there is any, one for the user before one that may pass."""
    found = [each for each in errors if each is not None]
    for kind, text in sorted(found, key=lambda each: each[0] is not UserError):
        raise kind(text)
