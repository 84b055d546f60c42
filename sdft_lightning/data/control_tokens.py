"""Tokens of the chat template that a row writes in its own text, where they would end a turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from sdft_lightning.errors import UserError
from sdft_lightning.models.chat_template import conversation_ids, known_thoughts
from sdft_lightning.types import Demonstration, Message


class ControlTokens:
    """Finds them.

    In the assistant's words these are the tokens that make a conversation (its own special tokens
    around thoughts and tool calls belong there), elsewhere all special tokens but for thoughts.

    Args:
        tokenizer: A tokenizer of transformers.
        stop_ids: Ids that end a completion.
    """

    def __init__(self, tokenizer: Any, stop_ids: list[int]) -> None:
        special = {str(a) for a in tokenizer.added_tokens_decoder.values() if a.special}
        thoughts = {part for pair in known_thoughts(tokenizer) for part in pair}
        making = tokenizer.convert_ids_to_tokens(sorted(conversation_ids(tokenizer, stop_ids)))
        # One of the vocabulary's own words as padding or unknown token is no control token.
        structure = special.intersection(making)
        self._said = _pattern(structure)
        self._other = _pattern((special - thoughts) | structure)

    def found(self, row: Demonstration) -> list[str]:
        """The tokens in a row's prompt, demonstration and context, in the order of the row."""
        tokens: list[str] = []
        for message in (*row.prompt, *row.demonstration):
            tokens += self._of(message).findall(message["content"])
        tokens += self._other.findall(row.context or "")
        return list(dict.fromkeys(tokens))

    def escaped(self, row: Demonstration) -> Demonstration:
        """The row with a blank behind the first character of each: an ordinary text."""
        return self._replaced(row, lambda match: f"{match[0][0]} {match[0][1:]}")

    def refuse(self, row: Demonstration) -> None:
        """Refuse a row that has any.

        Raises:
            UserError: Names the row and the tokens.
        """
        found = self.found(row)
        if found:
            raise UserError(
                f"{row.origin}: its text has control tokens ({', '.join(found)}). "
                "Take them out, or set data.prompts.control_tokens to escape (they become text) or "
                "tell (the model reads them as its own)."
            )

    def _replaced(
        self, row: Demonstration, change: Callable[[re.Match[str]], str]
    ) -> Demonstration:
        context = row.context
        return row._replace(
            prompt=self._messages(row.prompt, change),
            demonstration=self._messages(row.demonstration, change),
            context=context if context is None else self._other.sub(change, context),
        )

    def _messages(
        self, messages: list[Message], change: Callable[[re.Match[str]], str]
    ) -> list[Message]:
        return [
            {**message, "content": self._of(message).sub(change, message["content"])}
            for message in messages
        ]

    def _of(self, message: Message) -> re.Pattern[str]:
        return self._said if message["role"] == "assistant" else self._other


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Any of the tokens, longest first; those of one character cannot be told from a text."""
    longest = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")
