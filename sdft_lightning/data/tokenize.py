"""Rendered and tokenized rows, and what happens to those that do not fit."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

from sdft_lightning.data.prompts import (
    PromptStyle,
    answered_conversation,
    check_shown,
    demonstration_text,
    student_conversation,
    target_text,
    teacher_conversation,
)
from sdft_lightning.data.tokens import (
    ControlTokens,
    TokenizedRow,
    TokenStore,
    encode_texts,
    on_all_cores,
    stored,
    without_collection,
)
from sdft_lightning.errors import UserError, check_choice, shown
from sdft_lightning.models.chat_template import (
    Conversation,
    Rendering,
    continuation_ids,
    template_error,
    try_all,
)
from sdft_lightning.types import Demonstration, Message, RowNeeds

# Rows that are rendered and tokenized at once.
_CHUNK = 256
_AT_ONCE = 2  # chunks

TooLong = Literal["error", "skip", "truncate"]


@dataclass(frozen=True)
class Lengths:
    """Longest prompts, in tokens, and what to do with a row that exceeds one.

    Args:
        prompt: Longest student prompt.
        teacher_prompt: Longest teacher prompt.
        demonstration: Longest demonstration, where it is a target (SFT).
        too_long: error stops before training and names the row; skip leaves the row out; truncate
            cuts the end of the context, then of the demonstration, never the question. Skipped
            and truncated rows are counted.
        context: Longest source text, where it is a target (CPT); truncate cuts its end.
    """

    prompt: int = 1024
    teacher_prompt: int = 2048
    demonstration: int = 1024
    too_long: TooLong = "error"
    context: int = 2048

    def __post_init__(self) -> None:
        """Refuse an unknown reaction and lengths below 1."""
        check_choice("data.lengths.too_long", self.too_long, get_args(TooLong))
        # Of a context the first token is not predicted.
        least = {"prompt": 1, "teacher_prompt": 1, "demonstration": 1, "context": 2}
        for name, count in least.items():
            if getattr(self, name) < count:
                raise UserError(
                    f"data.lengths.{name}: got {getattr(self, name)}, allowed are {count} and more."
                )


class TokenizedRows(NamedTuple):
    """The rows that fit, how many did not, and what is to be said of the first of those."""

    rows: Sequence[TokenizedRow]
    skipped: int
    truncated: int
    first_too_long: str = ""


class RenderedRow(NamedTuple):
    """The texts of a row; empty where there is none."""

    prompt: str
    teacher: str
    target: str
    context: str = ""


class Tokenizer(NamedTuple):
    """What turns a row into token ids.

    Attributes:
        tokenizer: A tokenizer of transformers.
        style: How the teacher is shown the demonstration.
        lengths: What fits.
        stop_ids: Ids of which any ends a completion.
        needs: What the method does with a row; where it is about contexts (CPT), rows are these as
            plain text, not questions.
        vocabulary: Token ids that the model has embeddings for; None does not check them.
    """

    tokenizer: Any
    style: PromptStyle
    lengths: Lengths
    stop_ids: list[int]
    needs: RowNeeds = RowNeeds(target=True)
    vocabulary: int | None = None

    def __call__(self, row: Demonstration) -> TokenizedRow:
        """Render and tokenize a row as it is, whatever its lengths."""
        return self.many([row])[0]

    def many(self, rows: Sequence[Demonstration]) -> list[TokenizedRow]:
        """Render and tokenize rows as they are, whatever their lengths.

        Raises:
            UserError: If the chat template fails on a row, or leaves a text of it out; if a row
                has control tokens in its text, where they are refused; or if a token has no
                embedding.
        """
        shown = self._without_control(rows)
        if self.needs.context:
            texts = [RenderedRow("", "", "", row.context or "") for row in shown]
        else:
            texts = self._render(shown)
        found = self._tokenized(rows, texts)
        if self.vocabulary is not None and len(self.tokenizer) > self.vocabulary:
            for tokens in found:
                self._check_ids(tokens, self.vocabulary)
        return found

    def _check_ids(self, tokens: TokenizedRow, size: int) -> None:
        for ids in tokens[1:]:
            highest = max(ids, default=0)
            if highest >= size:
                token = self.tokenizer.convert_ids_to_tokens(highest)
                raise UserError(
                    f"{tokens.row.origin}: the token {token!r} has the id {highest}, and the model "
                    f"has only {size} embeddings. Use the tokenizer that belongs to the "
                    "model, or take the token out of row and chat template."
                )

    def _tokenized(
        self, rows: Sequence[Demonstration], texts: Sequence[RenderedRow]
    ) -> list[TokenizedRow]:
        if self.needs.context:
            return [
                TokenizedRow(row, [], [], [], self._encode_context(row, each.context))
                for row, each in zip(rows, texts, strict=True)
            ]
        all_texts = [each.prompt for each in texts]
        all_texts += [each.teacher for each in texts]
        all_texts += [each.prompt + each.target for each in texts if each.target]
        found = encode_texts(self.tokenizer, all_texts)
        prompts, teachers = found[: len(rows)], found[len(rows) : 2 * len(rows)]
        wholes = iter(found[2 * len(rows) :])
        targets = [
            continuation_ids(self.tokenizer, each.target, prompt, next(wholes))
            if each.target
            else []
            for each, prompt in zip(texts, prompts, strict=True)
        ]
        return [
            TokenizedRow(row, prompt, teacher, self._cut_after_stop(target) if target else [])
            for row, prompt, teacher, target in zip(rows, prompts, teachers, targets, strict=True)
        ]

    def _without_control(self, rows: Sequence[Demonstration]) -> Sequence[Demonstration]:
        """Rows without control tokens in their text, where that was asked for."""
        if self.style.control_tokens == "tell":
            return rows
        control = ControlTokens(self.tokenizer, self.stop_ids)
        if self.style.control_tokens == "escape":
            return [control.escaped(row) for row in rows]
        for row in rows:
            control.refuse(row)
        return rows

    def _render(self, rows: Sequence[Demonstration]) -> list[RenderedRow]:
        """The texts of rows, each of which shows all that it is to show."""
        conversations: list[Conversation] = []
        for row in rows:
            conversations.append(student_conversation(row, self.style))
            if row.demonstration and self.needs.target:
                conversations.append(answered_conversation(row, self.style))
            if row.demonstration and self.needs.teacher_prompt:
                conversations.append(teacher_conversation(row, self.style))
        asked = iter(zip(conversations, try_all(self.tokenizer, conversations), strict=False))
        found = []
        for row in rows:
            prompt = self._shown(row, *next(asked), "student")
            if not row.demonstration:
                found.append(RenderedRow(prompt, "", ""))
                continue
            text = demonstration_text(row)
            # Where nothing learns to write it, a target only tells how long answers are.
            target = f"{text}{self.tokenizer.eos_token}"
            if self.needs.target:
                conversation, answered = next(asked)
                if answered.text is None:
                    raise template_error(conversation, answered)
                target = target_text(self.tokenizer, text, prompt, answered.text)
            teacher = ""
            if self.needs.teacher_prompt:
                teacher = self._shown(row, *next(asked), "teacher")
            found.append(RenderedRow(prompt, teacher, target))
        return found

    def _shown(
        self, row: Demonstration, conversation: Conversation, found: Rendering, role: str
    ) -> str:
        if found.text is None:
            raise template_error(conversation, found)
        check_shown(row, conversation, found.text, role)
        return found.text

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text, in which all special tokens already stand."""
        return encode_texts(self.tokenizer, [text])[0]

    def _encode_context(self, row: Demonstration, context: str) -> list[int]:
        """The context as pre-training shows a document: between BOS and EOS, where there are such.

        Raises:
            UserError: If that leaves no token to predict.
        """
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [first, *self.encode(context), last]
        ids = [token for token in ids if token is not None]
        if len(ids) < 2:
            raise UserError(
                f"{row.origin}: the context {shown(context)} is a single token, which leaves "
                "nothing to predict. Lengthen it or remove the row."
            )
        return ids

    def _cut_after_stop(self, ids: list[int]) -> list[int]:
        """Drop what a chat template writes behind the token that ends the turn."""
        ends = [ids.index(stop) for stop in self.stop_ids if stop in ids]
        if ends:
            return ids[: min(ends) + 1]
        # A template that closes turns without a stop token: the student must still learn to stop.
        end = len(ids)
        while end and not self.tokenizer.decode(ids[end - 1 : end]).strip():
            end -= 1
        return [*ids[:end], self.tokenizer.eos_token_id]


def tokenize_rows(
    rows: list[Demonstration], tokenizer: Tokenizer, count_only: bool = False
) -> TokenizedRows:
    """Tokenize all rows, and stop, skip or truncate where one does not fit.

    Args:
        rows: The rows.
        tokenizer: With the lengths that they must fit.
        count_only: Where `too_long` is error, leave such rows out and count them, as skip does.

    Raises:
        UserError: If a row does not fit and `too_long` is error, or cannot be made to fit.
    """
    lengths = tokenizer.lengths
    kept = TokenStore()
    skipped = truncated = 0
    first = ""
    for tokens in _in_chunks(rows, tokenizer):
        if not _excess(tokens, tokenizer):
            kept.append(tokens)
            continue
        first = first or _too_long_message(tokens, tokenizer)
        if lengths.too_long == "error" and not count_only:
            raise UserError(first)
        if lengths.too_long == "truncate":
            kept.append(_truncate(tokens, tokenizer))
            truncated += 1
        else:
            skipped += 1
    if not kept:
        raise UserError(
            f"data.lengths: all {len(rows)} rows were skipped as too long. Raise the lengths. "
            f"The first: {first}"
        )
    return TokenizedRows(kept, skipped, truncated, first)


def _in_chunks(rows: Sequence[Demonstration], tokenizer: Tokenizer) -> Iterator[TokenizedRow]:
    """Tokenize rows, some chunks at once: tokenizer and chat template work beside Python."""
    chunks = (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
    with on_all_cores(), without_collection(), ThreadPoolExecutor(_AT_ONCE) as pool:
        begun = deque(pool.submit(tokenizer.many, chunk) for chunk in islice(chunks, _AT_ONCE + 1))
        while begun:
            found = begun.popleft().result()
            begun.extend(pool.submit(tokenizer.many, chunk) for chunk in islice(chunks, 1))
            yield from found


def check_model_takes(
    rows: Sequence[TokenizedRow], limit: int, new_tokens: int, by: str, longer_works: bool
) -> str | None:
    """Refuse rows that do not fit into the model with what is written behind them.

    Args:
        rows: Of a split.
        limit: Longest sequence that the model takes, in tokens.
        new_tokens: What may be sampled behind a prompt; 0 where the demonstration stands there.
        by: The option that says how much is sampled.
        longer_works: Whether the model computes longer sequences, too, though it never learned to.

    Returns:
        A warning where only the longest samples would have no room, if longer ones work.

    Raises:
        UserError: Names the longest row.
    """
    counts = [_sequence(each, new_tokens) for each in stored(rows).lengths()]
    longest = max(counts, default=0)
    if longest <= limit:
        return None
    row = rows[counts.index(longest)]
    wanted = (
        f"a prompt of {longest - new_tokens} tokens and up to {new_tokens} new ones ({by})"
        if new_tokens
        else f"{longest} tokens"
    )
    remedy = f"Lower {by}, lower" if new_tokens else "Lower"
    message = (
        f"{row.row.origin}: {wanted} do not fit into the model, which takes {limit} "
        f"({sum(count > limit for count in counts)} of {len(rows)} rows do not). {remedy} "
        "data.lengths with data.lengths.too_long: skip or truncate, or choose a model that takes "
        "more."
    )
    if longer_works and longest - new_tokens < limit and new_tokens:
        return f"{message} Samples that long are computed, but the model has not learned to."
    raise UserError(message)


def _sequence(lengths: tuple[int, int, int, int], new_tokens: int) -> int:
    """Tokens of the longest sequence that a row is part of."""
    prompt, teacher_prompt, demonstration, context = lengths
    if context:
        return context
    return max(prompt, teacher_prompt) + new_tokens if new_tokens else prompt + demonstration


def length_report(name: str, tokenized: TokenizedRows) -> str:
    """One line on the lengths of a split, in tokens."""
    parts = [f"{name}: {len(tokenized.rows)} rows"]
    labels = ("prompt", "teacher prompt", "demonstration", "context")
    by_kind = zip(*stored(tokenized.rows).lengths(), strict=True)
    for label, lengths in zip(labels, by_kind, strict=True):
        counts = [length for length in lengths if length]
        if counts:
            parts.append(f"{label} {statistics.median(counts):.0f} (longest {max(counts)})")
    parts.append(f"{tokenized.skipped} skipped, {tokenized.truncated} truncated as too long")
    return "; ".join(parts)


def _excess(tokens: TokenizedRow, tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens over the limit, by the name of the limit; empty if the row fits."""
    lengths = tokenizer.lengths
    over = {
        "prompt": len(tokens.prompt_ids) - lengths.prompt,
        "teacher_prompt": len(tokens.teacher_prompt_ids) - lengths.teacher_prompt,
        "demonstration": len(tokens.demonstration_ids) - lengths.demonstration,
        "context": len(tokens.context_ids) - lengths.context,
    }
    if not tokenizer.needs.target:
        del over["demonstration"]
    return {name: count for name, count in over.items() if count > 0}


def _too_long_message(tokens: TokenizedRow, tokenizer: Tokenizer) -> str:
    over = _excess(tokens, tokenizer)
    name = next(iter(over))
    limit = getattr(tokenizer.lengths, name)
    counted = (
        f"prompt {len(tokens.prompt_ids)}, teacher prompt {len(tokens.teacher_prompt_ids)}, "
        f"demonstration {len(tokens.demonstration_ids)}"
    )
    if tokens.context_ids:
        counted = f"context {len(tokens.context_ids)}"
    return (
        f"{tokens.row.origin}: too long: its {name.replace('_', ' ')} has {limit + over[name]} "
        f"tokens, data.lengths.{name} is {limit} ({counted}). Three remedies: raise "
        f"data.lengths.{name}; leave such rows out with "
        "data.lengths.too_long: skip; or shorten context and demonstration with "
        "data.lengths.too_long: truncate."
    )


def _truncate(tokens: TokenizedRow, tokenizer: Tokenizer) -> TokenizedRow:
    limit = tokenizer.lengths.demonstration
    row, target = tokens.row, tokens.demonstration_ids
    if tokens.context_ids:
        return tokens._replace(context_ids=tokens.context_ids[: tokenizer.lengths.context])
    for _ in range(8):  # re-tokenizing a cut text may give a token more or less
        excess = _excess(tokens, tokenizer)
        over = max(excess.get("teacher_prompt", 0), 0)
        if "prompt" in excess or not over:
            break
        row = _shorten(row, over, tokenizer)
        tokens = tokenizer(row)
    # What is predicted is cut at its own limit only, and never ends with a stop token that is not
    # its own.
    tokens = tokens._replace(demonstration_ids=target[:limit])
    if _excess(tokens, tokenizer):
        raise UserError(
            f"{_too_long_message(tokens, tokenizer)} It was tried with truncate: the "
            "question alone does not fit, and it is never cut."
        )
    return tokens


def _shorten(row: Demonstration, over: int, tokenizer: Tokenizer) -> Demonstration:
    """Cut `over` tokens from the end of the context, then of the demonstration."""
    if tokenizer.style.needs_context and row.context:
        shown = sum(turn["content"].count("$context") for turn in tokenizer.style.turns)
        ids = tokenizer.encode(row.context)
        keep = max(1, len(ids) - -(-over // max(1, shown)))
        if keep < len(ids):
            return row._replace(context=tokenizer.tokenizer.decode(ids[:keep]))
    last: Message = row.demonstration[-1]
    ids = tokenizer.encode(last["content"])
    shorter = tokenizer.tokenizer.decode(ids[: max(1, len(ids) - over)])
    return row._replace(demonstration=[*row.demonstration[:-1], {**last, "content": shorter}])
