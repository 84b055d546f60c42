"""Where a judge is and how it is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdft_lightning.errors import UserError
from sdft_lightning.files.endpoints import LONGEST_TIMEOUT, check_address, check_variable_name


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
