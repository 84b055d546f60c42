"""Completions as text: what was said, and the answer in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sdft_lightning.models.chat_template.thoughts import Markers, opens_thought, without_thoughts
from sdft_lightning.models.chat_template.turns import conversation_ids, known_thoughts

# Enough of a prompt's end to hold the assistant header.
_HEADER_TOKENS = 32


class AnswerReader:
    """Makes text of a model's tokens.

    Special tokens that make a conversation (beginning, end, padding, turns) are left out. Others,
    like those around thoughts and tool calls, belong to what is said.

    Args:
        tokenizer: A tokenizer of transformers.
        stop_ids: Ids that end a completion.
    """

    def __init__(self, tokenizer: Any, stop_ids: list[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = list(stop_ids)
        self._hidden = conversation_ids(tokenizer, self.stop_ids)
        self._markers = known_thoughts(tokenizer)

    def text(self, ids: Iterable[int]) -> str:
        """What was said, thoughts included."""
        shown = [token for token in ids if token not in self._hidden]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False))

    def opened(self, prompt_ids: list[int]) -> Markers | None:
        """The markers of the thought that a prompt opens; None where it opens none.

        Args:
            prompt_ids: Ids of the prompt; its last ones are looked at.
        """
        header: list[int] = []
        for token in prompt_ids[-_HEADER_TOKENS:]:
            # What stands before the last token of the conversation is another turn.
            header = [] if token in self._hidden else [*header, token]
        return opens_thought(self.tokenizer.decode(header), self._markers)

    def answer(self, text: str, opened: Markers | None = None) -> str:
        """What was said besides thoughts; empty where a thought never ends.

        Args:
            text: See `text`.
            opened: See `opened`.
        """
        return without_thoughts(text, self._markers, opened)
