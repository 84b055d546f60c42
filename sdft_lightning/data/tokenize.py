"""Rendered and tokenized rows, and what happens to those that do not fit."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.prompts import PromptStyle, render_student, render_target, render_teacher
from sdft_lightning.types import Demonstration, Message, RowNeeds

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


class TokenizedRows(NamedTuple):
    """The rows that fit, how many did not, and what is to be said of the first of those."""

    rows: list[TokenizedRow]
    skipped: int
    truncated: int
    first_too_long: str = ""


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
        """Render and tokenize a row as it is, whatever its lengths.

        Raises:
            UserError: If a token has no embedding.
        """
        tokens = self._tokenize(row)
        self._check_ids(tokens)
        return tokens

    def _check_ids(self, tokens: TokenizedRow) -> None:
        for ids in tokens[1:]:
            highest = max(ids, default=0)
            if self.vocabulary is not None and highest >= self.vocabulary:
                token = self.tokenizer.convert_ids_to_tokens(highest)
                raise UserError(
                    f"{tokens.row.origin}: the token {token!r} has the id {highest}, and the model "
                    f"has only {self.vocabulary} embeddings. Use the tokenizer that belongs to the "
                    "model, or take the token out of row and chat template."
                )

    def _tokenize(self, row: Demonstration) -> TokenizedRow:
        if self.needs.context:
            return TokenizedRow(row, [], [], [], self._encode_context(row))
        prompt_ids = self.encode(render_student(self.tokenizer, row, self.style))
        if not row.demonstration:
            return TokenizedRow(row, prompt_ids, [], [])
        teacher_ids: list[int] = []
        if self.needs.teacher_prompt:
            teacher_ids = self.encode(render_teacher(self.tokenizer, row, self.style))
        target = self.encode(render_target(self.tokenizer, row, self.style))
        return TokenizedRow(row, prompt_ids, teacher_ids, self._cut_after_stop(target))

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text, in which all special tokens already stand."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _encode_context(self, row: Demonstration) -> list[int]:
        """The context as pre-training shows a document: between BOS and EOS, where there are such.

        Raises:
            UserError: If that leaves no token to predict.
        """
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [first, *self.encode(row.context or ""), last]
        ids = [token for token in ids if token is not None]
        if len(ids) < 2:
            raise UserError(
                f"{row.origin}: the context {row.context!r} is a single token, which leaves "
                "nothing to predict. Lengthen it or remove the row."
            )
        return ids

    def _cut_after_stop(self, ids: list[int]) -> list[int]:
        """Drop what a chat template writes behind the token that ends the turn."""
        for place, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[: place + 1]
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
    kept: list[TokenizedRow] = []
    skipped = truncated = 0
    first = ""
    for row in rows:
        tokens = tokenizer(row)
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
    counts = [_sequence(tokens, new_tokens) for tokens in rows]
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


def _sequence(tokens: TokenizedRow, new_tokens: int) -> int:
    """Tokens of the longest sequence that a row is part of."""
    if tokens.context_ids:
        return len(tokens.context_ids)
    if not new_tokens:
        return len(tokens.prompt_ids) + len(tokens.demonstration_ids)
    return max(len(tokens.prompt_ids), len(tokens.teacher_prompt_ids)) + new_tokens


def length_report(name: str, tokenized: TokenizedRows) -> str:
    """One line on the lengths of a split, in tokens."""
    parts = [f"{name}: {len(tokenized.rows)} rows"]
    labels = ("prompt", "teacher prompt", "demonstration", "context")
    for place, label in enumerate(labels, start=1):
        counts = [len(row[place]) for row in tokenized.rows if row[place]]
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
