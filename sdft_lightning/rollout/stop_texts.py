"""Texts that end a completion, however they are cut into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class StopTexts:
    """Looks for any of several texts at the end of growing completions.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: The texts; empty ones are left out.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.texts = [text for text in texts if text]
        # Every token holds a byte at least; one more, as the text may begin inside a token.
        self._lookback = 1 + max((len(text.encode()) for text in self.texts), default=0)

    def found(self, completion_ids: Tensor) -> Tensor:
        """Which completions end with, or have just passed, one of the texts.

        Args:
            completion_ids: `(A, T)`, without padding.

        Returns:
            `(A,)` boolean.
        """
        if not self.texts:
            return torch.zeros(
                completion_ids.shape[0], dtype=torch.bool, device=completion_ids.device
            )
        ends = self.tokenizer.batch_decode(completion_ids[:, -self._lookback :])
        hits = [any(text in end for text in self.texts) for end in ends]
        return torch.tensor(hits, device=completion_ids.device)

    def cut(self, completion: str) -> str:
        """A completion up to the first of the texts."""
        for text in self.texts:
            completion = completion.split(text)[0]
        return completion
