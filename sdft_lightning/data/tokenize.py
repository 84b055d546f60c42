"""Rendered and tokenized rows, and what happens to those that do not fit."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.prompts import PromptStyle, render_student, render_target, render_teacher
from sdft_lightning.types import Demonstration, Message

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
    """

    prompt: int = 1024
    teacher_prompt: int = 2048
    demonstration: int = 1024
    too_long: TooLong = "error"

    def __post_init__(self) -> None:
        """Refuse an unknown reaction and lengths below 1."""
        check_choice("data.lengths.too_long", self.too_long, get_args(TooLong))
        for name in ("prompt", "teacher_prompt", "demonstration"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"data.lengths.{name}: got {getattr(self, name)}, allowed are 1 and more."
                )


class TokenizedRow(NamedTuple):
    """A row with its token ids; the last two are empty where there is no demonstration."""

    row: Demonstration
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    demonstration_ids: list[int]


class TokenizedRows(NamedTuple):
    """The rows that fit, and how many did not."""

    rows: list[TokenizedRow]
    skipped: int
    truncated: int


class Tokenizer(NamedTuple):
    """What turns a row into token ids.

    Attributes:
        tokenizer: A tokenizer of transformers.
        style: How the teacher is shown the demonstration.
        lengths: What fits.
        stop_ids: Ids of which any ends a completion.
    """

    tokenizer: Any
    style: PromptStyle
    lengths: Lengths
    stop_ids: list[int]

    def __call__(self, row: Demonstration) -> TokenizedRow:
        """Render and tokenize a row as it is, whatever its lengths."""
        prompt_ids = self.encode(render_student(self.tokenizer, row, self.style))
        if not row.demonstration:
            return TokenizedRow(row, prompt_ids, [], [])
        teacher_ids = self.encode(render_teacher(self.tokenizer, row, self.style))
        target = self.encode(render_target(self.tokenizer, row, self.style))
        return TokenizedRow(row, prompt_ids, teacher_ids, self._cut_after_stop(target))

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text, in which all special tokens already stand."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
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


def tokenize_rows(rows: list[Demonstration], tokenizer: Tokenizer) -> TokenizedRows:
    """Tokenize all rows, and stop, skip or truncate where one does not fit.

    Raises:
        UserError: If a row does not fit and `too_long` is error, or cannot be made to fit.
    """
    lengths = tokenizer.lengths
    kept: list[TokenizedRow] = []
    skipped = truncated = 0
    for row in rows:
        tokens = tokenizer(row)
        if not _excess(tokens, lengths):
            kept.append(tokens)
        elif lengths.too_long == "error":
            raise UserError(_too_long_message(tokens, lengths))
        elif lengths.too_long == "skip":
            skipped += 1
        else:
            kept.append(_truncate(tokens, tokenizer))
            truncated += 1
    if not kept:
        raise UserError(
            f"data.lengths: all {len(rows)} rows were skipped as too long. Raise the lengths."
        )
    return TokenizedRows(kept, skipped, truncated)


def length_report(name: str, tokenized: TokenizedRows) -> str:
    """One line on the lengths of a split, in tokens."""
    parts = [f"{name}: {len(tokenized.rows)} rows"]
    for label, place in (("prompt", 1), ("teacher prompt", 2), ("demonstration", 3)):
        counts = [len(row[place]) for row in tokenized.rows if row[place]]
        if counts:
            parts.append(f"{label} {statistics.median(counts):.0f} (longest {max(counts)})")
    parts.append(f"{tokenized.skipped} skipped, {tokenized.truncated} truncated as too long")
    return "; ".join(parts)


def _excess(tokens: TokenizedRow, lengths: Lengths) -> dict[str, int]:
    """Tokens over the limit, by the name of the limit; empty if the row fits."""
    over = {
        "prompt": len(tokens.prompt_ids) - lengths.prompt,
        "teacher_prompt": len(tokens.teacher_prompt_ids) - lengths.teacher_prompt,
        "demonstration": len(tokens.demonstration_ids) - lengths.demonstration,
    }
    return {name: count for name, count in over.items() if count > 0}


def _too_long_message(tokens: TokenizedRow, lengths: Lengths) -> str:
    over = _excess(tokens, lengths)
    name = next(iter(over))
    limit = getattr(lengths, name)
    return (
        f"{tokens.row.origin}: too long: its {name.replace('_', ' ')} has {limit + over[name]} "
        f"tokens, data.lengths.{name} is {limit} (prompt {len(tokens.prompt_ids)}, teacher prompt "
        f"{len(tokens.teacher_prompt_ids)}, demonstration {len(tokens.demonstration_ids)}). Three "
        f"remedies: raise data.lengths.{name}; leave such rows out with "
        "data.lengths.too_long: skip; or shorten context and demonstration with "
        "data.lengths.too_long: truncate."
    )


def _truncate(tokens: TokenizedRow, tokenizer: Tokenizer) -> TokenizedRow:
    limit = tokenizer.lengths.demonstration
    row = tokens.row
    for _ in range(8):  # re-tokenizing a cut text may give a token more or less
        excess = _excess(tokens, tokenizer.lengths)
        over = max(excess.get("teacher_prompt", 0), 0)
        if "prompt" in excess or not over:
            break
        row = _shorten(row, over, tokenizer)
        tokens = tokenizer(row)
    tokens = tokens._replace(demonstration_ids=tokens.demonstration_ids[:limit])
    if _excess(tokens, tokenizer.lengths):
        raise UserError(
            f"{_too_long_message(tokens, tokenizer.lengths)} It was tried with truncate: the "
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
