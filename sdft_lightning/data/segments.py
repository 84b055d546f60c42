"""Token ids of texts that share parts: each part between two special tokens is tokenized once.

The prompt of the student, that of the teacher and the answered conversation of a row hold the same
question and demonstration, and all rows the same system turn. Tokenizers split a text at their
special tokens before anything else, so that the ids of such parts do not depend on one another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

_PROOF = 64  # texts that are tokenized both ways before a tokenizer is trusted with parts


class SegmentEncoder:
    """Tokenizes texts in which all special tokens already stand.

    Whether a tokenizer treats the parts of a text alone is found out on the first texts (some write
    a blank before the very first word only); where it does not, texts are tokenized whole.

    Args:
        tokenizer: A tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._parts = _special_tokens(tokenizer)
        self._is_proven = False

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        if self._parts is None or len(texts) < 2:
            return self._whole(texts)
        if not self._is_proven:
            first = texts[:_PROOF]
            self._is_proven = self._whole(first) == self._in_parts(first, self._parts)
            if not self._is_proven:
                self._parts = None
                return self._whole(texts)
        return self._in_parts(texts, self._parts)

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = found.input_ids
        return ids

    def _in_parts(self, texts: Sequence[str], special: re.Pattern[str]) -> list[list[int]]:
        parts = [[part for part in special.split(text) if part] for text in texts]
        unique = list(dict.fromkeys(chain.from_iterable(parts)))
        backend = self._tokenizer.backend_tokenizer
        if backend.truncation is not None or backend.padding is not None:  # left by another call
            backend.no_truncation()
            backend.no_padding()
        # Without the offsets, masks and word numbers that nobody asked for.
        encoded = backend.encode_batch_fast(unique, add_special_tokens=False)
        ids = {part: each.ids for part, each in zip(unique, encoded, strict=True)}
        return [list(chain.from_iterable([ids[part] for part in each])) for each in parts]


def _special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """What splits a text; None where the tokenizer has no such tokens, or is not a fast one."""
    added = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
    splitting: set[str] = set()
    others: set[str] = set()
    for token in added:
        plain = token.special and not (token.lstrip or token.rstrip or token.single_word)
        (splitting if plain and not token.normalized else others).add(token.content)
    texts = [text for text in splitting if text and not any(text in other for other in others)]
    if not texts or not getattr(tokenizer, "is_fast", False):
        return None
    # The longest of those that begin at one place is the one that is meant.
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


_ENCODERS: WeakKeyDictionary[Any, SegmentEncoder] = WeakKeyDictionary()


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, as `tokenizer(text, add_special_tokens=False)` gives them."""
    encoder = _ENCODERS.get(tokenizer)
    if encoder is None:
        encoder = _ENCODERS[tokenizer] = SegmentEncoder(tokenizer)
    return encoder(texts)
