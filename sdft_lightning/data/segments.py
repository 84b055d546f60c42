"""Token ids of texts that share parts: each part between two special tokens is tokenized once.

The prompt of the student, that of the teacher and the answered conversation of a row hold the same
question and demonstration, and all rows the same system turn. Tokenizers split a text at their
special tokens before anything else, so that the ids of such parts do not depend on one another.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

_PROOF = 64  # texts that are tokenized both ways before a tokenizer is trusted with parts


class SegmentEncoder:
    """Tokenizes texts in which all special tokens already stand.

    Whether a tokenizer treats the parts of a text alone is found out on the first texts (some write
    a blank before the very first word only); where it does not, texts are tokenized whole. Threads
    may share one.

    Args:
        tokenizer: A tokenizer of transformers. It is not kept: each call brings it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._lock = threading.Lock()
        self._parts = _special_tokens(tokenizer)
        self._is_proven = False

    def __call__(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        if len(texts) > 1:
            with self._lock:
                parts = self._proven(tokenizer, texts[:_PROOF])
            if parts is not None:
                return _in_parts(tokenizer, texts, parts)
        return _whole(tokenizer, texts)

    def _proven(self, tokenizer: Any, first: Sequence[str]) -> re.Pattern[str] | None:
        """What splits texts; None where they are to be tokenized whole."""
        if self._parts is not None and not self._is_proven:
            if _whole(tokenizer, first) == _in_parts(tokenizer, first, self._parts):
                self._is_proven = True
            else:
                self._parts = None
        return self._parts


def _whole(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = found.input_ids
    return ids


def _in_parts(tokenizer: Any, texts: Sequence[str], special: re.Pattern[str]) -> list[list[int]]:
    parts = [[part for part in special.split(text) if part] for text in texts]
    unique = list(dict.fromkeys(chain.from_iterable(parts)))
    backend = tokenizer.backend_tokenizer
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
    return encoder(tokenizer, texts)
