"""Token ids of many rows in little memory and time, and control tokens that rows write.

The prompt of the student, that of the teacher and the answered conversation of a row hold the same
question and demonstration, and all rows the same system turn. Tokenizers split a text at their
special tokens before anything else, so that the ids of such parts do not depend on one another.
"""

from __future__ import annotations

import gc
import os
import re
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import Any, NamedTuple, overload
from weakref import WeakKeyDictionary

from sdft_lightning.errors import UserError
from sdft_lightning.models.chat_template import conversation_ids, known_thoughts
from sdft_lightning.types import Demonstration, Message

_PARALLEL = "TOKENIZERS_PARALLELISM"

_KINDS = 4  # prompt, teacher prompt, demonstration, context


class TokenizedRow(NamedTuple):
    """A row with its token ids.

    Teacher prompt and demonstration are empty where there is no demonstration; the context is empty
    where it is not trained on, and the only one that is not where it is.
    """

    row: Demonstration
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    demonstration_ids: list[int]
    context_ids: Sequence[int] = ()


class TokenStore(Sequence[TokenizedRow]):
    """A list of tokenized rows, whose ids become lists when a row is looked at.

    A list holds each id as an object of its own, ten times the memory: of 200,000 rows of 300 bytes
    two gigabytes.

    Args:
        rows: The first rows.
    """

    def __init__(self, rows: Iterable[TokenizedRow] = ()) -> None:
        self._rows: list[Demonstration] = []
        self._ids = array("H")  # of 16 bits, as long as all ids are below 65,536
        self._ends = array("q", [0])  # of each kind of each row, in `_ids`
        for row in rows:
            self.append(row)

    def append(self, tokens: TokenizedRow) -> None:
        """Keep one more row."""
        self._rows.append(tokens.row)
        for ids in tokens[1:]:
            known = ids if isinstance(ids, list) else list(ids)
            try:
                self._ids.fromlist(known)  # all of them or none
            except OverflowError:
                self._ids = array("i", self._ids)
                self._ids.fromlist(known)
            self._ends.append(len(self._ids))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedRow]: ...
    def __getitem__(self, index: int | slice) -> TokenizedRow | list[TokenizedRow]:
        """A row with its ids, or a list of such rows."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self._rows[index]
        first = index % len(self._rows) * _KINDS
        ends = self._ends[first : first + _KINDS + 1]
        prompt, teacher, target, context = (
            self._ids[start:end].tolist() for start, end in pairwise(ends)
        )
        return TokenizedRow(row, prompt, teacher, target, context)

    def __eq__(self, other: object) -> bool:
        """Whether another list holds the same rows."""
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment] # it grows

    @property
    def demonstrations(self) -> list[Demonstration]:
        """The rows without their ids."""
        return list(self._rows)

    def lengths(self) -> list[tuple[int, int, int, int]]:
        """Tokens of prompt, teacher prompt, demonstration and context of each row."""
        counts = [end - start for start, end in pairwise(self._ends)]
        kinds = [counts[kind::_KINDS] for kind in range(_KINDS)]
        return list(zip(kinds[0], kinds[1], kinds[2], kinds[3], strict=True))


def stored(rows: Iterable[TokenizedRow]) -> TokenStore:
    """Rows as a store, the same one where they are one."""
    return rows if isinstance(rows, TokenStore) else TokenStore(rows)


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


@contextmanager
def without_collection() -> Iterator[None]:
    """Rows and ids hold no cycles, and looking for such among millions of objects takes a tenth."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def on_all_cores() -> Iterator[None]:
    """Let the tokenizer use all cores, which `quiet` forbids: processes are forked afterwards."""
    if os.environ.get(_PARALLEL) != "false":
        yield
        return
    os.environ[_PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ[_PARALLEL] = "false"
