"""Asks a model behind an OpenAI-compatible endpoint for grades; counts costs, keeps verdicts."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdft_lightning.errors import UserError, extra_remedy, key_from, mask, printable, shown
from sdft_lightning.files.endpoints import LONGEST_TIMEOUT, check_address, check_variable_name
from sdft_lightning.graders.rubrics import (
    JUDGED,
    JudgedGrader,
    judge_messages,
    read_verdict,
)

if TYPE_CHECKING:
    import openai


@dataclass(frozen=True)
class JudgeSettings:
    """An OpenAI-compatible endpoint whose model judges completions.

    Args:
        model: Name of the model at the endpoint; no judge is used without one.
        base_url: Address of the endpoint, such as http://localhost:8000/v1; OpenAI's own where
            none is given.
        api_key_variable: Environment variable with the key. An endpoint with its own base_url may
            do without.
        temperature: Of the judge; null leaves it out of the request, as some models ask for.
        max_retries: How often a request that failed (no connection, time out, rate limit, server
            error) is sent again, each time after a longer pause.
        timeout_seconds: Of one request, to the last byte of its reply.
        max_unreadable: How often the judge is asked again after a reply that is no verdict.
        parallel: Requests under way at once, on each rank.
        cache: Folder of the verdicts, kept between runs; <cache folder>/judge where none is given.
        input_price: Per million tokens sent, in any currency; the cost is reported with it.
        output_price: Per million tokens received.
        gold_rows: How many gold answers are judged before the run starts.
    """

    model: str = ""
    base_url: str | None = None
    api_key_variable: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_retries: int = 5
    timeout_seconds: float = 60.0
    max_unreadable: int = 2
    parallel: int = 8
    cache: str | None = None
    input_price: float | None = None
    output_price: float | None = None
    gold_rows: int = 10

    def __post_init__(self) -> None:
        """Refuse secrets, which would be written down with the options, whether asked or not.

        Raises:
            UserError: Names the option and where the secret belongs.
        """
        if self.base_url is not None:
            check_address("data.judge.base_url", self.base_url)
        check_variable_name("data.judge.api_key_variable", self.api_key_variable)

    def check(self) -> None:
        """Refuse numbers that cannot be meant.

        Raises:
            UserError: Names the option and what it may be.
        """
        for name, least in (
            ("max_retries", 0),
            ("max_unreadable", 0),
            ("parallel", 1),
            ("gold_rows", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(
                    f"data.judge.{name}: got {getattr(self, name)}, allowed are {least} and more."
                )
        if not 0 < self.timeout_seconds <= LONGEST_TIMEOUT:
            raise UserError(
                f"data.judge.timeout_seconds: got {self.timeout_seconds}, allowed is more than 0, "
                f"up to {LONGEST_TIMEOUT:g} (a day)."
            )
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise UserError(
                f"data.judge.temperature: got {self.temperature}, allowed are 0 and more, or null."
            )
        if (self.input_price is None) != (self.output_price is None):
            raise UserError(
                "data.judge: input_price and output_price belong together; give both or neither."
            )
        for name in ("input_price", "output_price"):
            price = getattr(self, name)
            if price is not None and not 0 <= price < math.inf:
                raise UserError(f"data.judge.{name}: got {price}, allowed are 0 and more.")


log = logging.getLogger(__name__)

_MOST_TOKENS = 10**8  # of one request or reply; a larger count is none


class Answer(NamedTuple):
    """A completion to judge: the question, the right answer and what the model said."""

    question: str
    reference: str
    text: str


@dataclass
class Usage:
    """What a judge was asked and what it took, since the last report.

    Attributes:
        judged: Answers with a verdict.
        cached: Those of them whose verdict was known.
        unjudged: Answers without a verdict: they count neither as right nor as wrong.
        input_tokens: Sent.
        output_tokens: Received.
    """

    judged: int = 0
    cached: int = 0
    unjudged: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _NoVerdictError(Exception):
    """The endpoint failed, or what it said is no verdict."""


class Judge:
    """A model behind an OpenAI-compatible endpoint that grades completions.

    Args:
        settings: Where it is and how it is asked.
        folder: Where verdicts are kept.

    Raises:
        UserError: The extra is not installed, the key is missing, or an option is wrong.
    """

    def __init__(self, settings: JudgeSettings, folder: Path) -> None:
        settings.check()
        self.settings = settings
        self.usage = Usage()
        self._cache = VerdictCache(folder)
        self._client = _client(settings)
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def check(self, grader: str, answers: Sequence[Answer]) -> list[float]:
        """Grade gold answers before a run: what fails here would fail in every validation.

        Args:
            grader: A name in `JUDGED`.
            answers: What to judge.

        Returns:
            One score in [0, 1] for each.

        Raises:
            UserError: The endpoint cannot be used, or does not give verdicts.
        """
        try:
            return self._all(JUDGED[grader], answers)
        except _NoVerdictError as error:
            where = self.settings.base_url or "OpenAI's endpoint"
            raise UserError(
                f"data.judge: {self.settings.model} at {where} gave no verdict: {error}. Correct "
                f"data.judge, or use the grader {JUDGED[grader].offline}, which needs no endpoint."
            ) from error

    def grade(self, grader: str, answers: Sequence[Answer]) -> list[float]:
        """Grade completions; a judge that fails does not end the run.

        Args:
            grader: A name in `JUDGED`.
            answers: What to judge.

        Returns:
            One score in [0, 1] for each; NaN where there is no verdict.
        """
        return self._all(JUDGED[grader], answers, fails=False)

    def take_usage(self) -> Usage:
        """What was asked since the last call; what went wrong is told anew from here on."""
        found, self.usage = self.usage, Usage()
        self._told.clear()
        return found

    def cost(self, usage: Usage) -> float | None:
        """What it cost by the prices of the settings; None without prices."""
        given, got = self.settings.input_price, self.settings.output_price
        if given is None or got is None:
            return None
        return (usage.input_tokens * given + usage.output_tokens * got) / 1e6

    def _all(
        self, grader: JudgedGrader, answers: Sequence[Answer], fails: bool = True
    ) -> list[float]:
        failures: list[str] = []

        def score(answer: Answer) -> float:
            try:
                return grader.worth[self._verdict(grader, answer)]
            except _NoVerdictError as error:
                if fails:
                    raise
                with self._lock:
                    self.usage.unjudged += 1
                    failures.append(str(error))
                return math.nan

        with ThreadPoolExecutor(self.settings.parallel) as pool:
            scores = list(pool.map(score, answers))
        if failures:
            self._tell(
                "no verdict",
                f"{len(failures)} of {len(answers)} answers have no verdict and are left out of "
                f"the score: {failures[0]}",
            )
        return scores

    def _tell(self, kind: str, text: str) -> None:
        """Warn once until `take_usage`, which counts the rest."""
        with self._lock:
            known = kind in self._told
            self._told.add(kind)
        if not known:
            log.warning(text)

    def _verdict(self, grader: JudgedGrader, answer: Answer) -> str:
        settings = self.settings
        messages = judge_messages(grader.rubric, answer.question, answer.reference, answer.text)
        _check_encodes(messages)
        request: dict[str, Any] = {"model": settings.model, "messages": messages}
        if settings.temperature is not None:
            request["temperature"] = settings.temperature
        key = {"base_url": settings.base_url, **request}
        known = self._cache.get(key)
        if known is not None and (verdict := read_verdict(grader.rubric, known)) is not None:
            with self._lock:
                self.usage.judged += 1
                self.usage.cached += 1
            return verdict
        reply = ""
        for _ in range(1 + settings.max_unreadable):
            reply = self._ask(request)
            verdict = read_verdict(grader.rubric, reply)
            if verdict is not None:
                if problem := self._cache.put(key, reply):
                    self._tell("cache", f"a verdict counts but could not be kept: {problem}")
                with self._lock:
                    self.usage.judged += 1
                return verdict
        raise _NoVerdictError(
            f"{1 + settings.max_unreadable} replies were not the JSON object that was asked for, "
            f"the last was {shown(reply)}"
        )

    def _ask(self, request: dict[str, Any]) -> str:
        import openai

        try:
            response = self._client.chat.completions.create(**request)
        except openai.OpenAIError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            found = printable(f"{type(error).__name__}: {error}{cause}")
            # Without the client's error: its traceback would show the whole reply.
            raise _NoVerdictError(found) from None
        except Exception as error:  # the client reads replies of any form and nesting
            raise _NoVerdictError(_no_completion(f"{type(error).__name__}: {error}")) from None
        # The client checks no types: what is no chat completion arrives as text, or half empty.
        self._count(getattr(response, "usage", None))
        try:
            choices = response.choices or []
            reply = (choices[0].message.content or "") if choices else ""
        except (AttributeError, TypeError, KeyError):
            raise _NoVerdictError(_no_completion(response)) from None
        if not isinstance(reply, str):
            raise _NoVerdictError(_no_completion(response))
        return reply

    def _count(self, usage: object) -> None:
        """Add up the tokens of a reply; what is no count is told and left out."""
        counts = [getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")]
        given, got = (count if _is_count(count) else 0 for count in counts)
        with self._lock:
            self.usage.input_tokens += given
            self.usage.output_tokens += got
        odd = [count for count in counts if count is not None and not _is_count(count)]
        if odd:
            self._tell(
                "usage",
                f"the endpoint of the judge {self.settings.model} counts {shown(odd[0])} "
                "tokens; what is no count is left out of tokens and cost.",
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS


def _check_encodes(messages: object) -> None:
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _NoVerdictError(
            "question, reference or answer hold half of a character (a lone surrogate), which "
            "cannot be sent"
        ) from None


def _no_completion(response: object) -> str:
    try:
        text = str(response)
    except Exception:  # of any form and nesting
        text = type(response).__name__
    return (
        "the endpoint answered with something else than a chat completion, "
        f"{shown(text)}; base_url mostly ends in /v1"
    )


def _client(settings: JudgeSettings) -> openai.OpenAI:
    try:
        import openai
    except ImportError as error:
        raise UserError(
            f"data.judge: asking a judge needs the package openai. {extra_remedy('judge')}."
        ) from error
    from sdft_lightning.graders.transport import BoundedTransport

    key = key_from(settings.api_key_variable)
    if not key and settings.base_url is None:
        raise UserError(
            f"data.judge: the environment variable {settings.api_key_variable} is empty and "
            "OpenAI's endpoint asks for a key. Set it, name another with "
            "--data.judge.api_key_variable, or give the --data.judge.base_url of your own server."
        )
    client = openai.OpenAI(
        api_key=key or "none",
        base_url=settings.base_url,
        max_retries=settings.max_retries,
        timeout=settings.timeout_seconds,
        http_client=openai.DefaultHttpxClient(
            transport=BoundedTransport(settings.timeout_seconds), follow_redirects=False
        ),
    )
    check_address("OPENAI_BASE_URL", str(client.base_url))  # the client may take it from there
    return client


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
