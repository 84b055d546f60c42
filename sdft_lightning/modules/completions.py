"""Completions that are made once for each row and kept: by the teacher, or by somebody else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdft_lightning.errors import UserError, printable, shown
from sdft_lightning.models.chat_template import answer_ids
from sdft_lightning.types import Demonstration, PromptBatch, Rollout

_FORM = (
    'Each line must be {"id": …, "completion": …}, with "truncated": true where the text does not '
    'end by itself, or with "token_ids": […] instead of the text.'
)


class KeptCompletion(NamedTuple):
    """One completion of a row.

    Attributes:
        token_ids: Up to and including the stop token.
        truncated: Whether it ends without one.
    """

    token_ids: list[int]
    truncated: bool


class KeptCompletions:
    """Completions by the id of their row, with a state for checkpoints.

    A module asks which rows of a batch are `missing`, hands what was written for them to
    `put_rollout`, and takes the `rollout` of all rows. Ranks `share` what they have whenever rows
    go to other ranks, and before a checkpoint.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[KeptCompletion]] = {}

    def __contains__(self, row_id: str) -> bool:
        """Whether a row has its completions."""
        return row_id in self._rows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def missing(self, batch: PromptBatch) -> PromptBatch:
        """The rows of a batch without completions, with what a teacher needs to write them."""
        places = [place for place, row in enumerate(batch.rows) if row.id not in self]
        return batch._replace(
            teacher_prompt_ids=batch.teacher_prompt_ids[places],
            teacher_prompt_mask=batch.teacher_prompt_mask[places],
            rows=[batch.rows[place] for place in places],
        )

    def put(self, row_id: str, completions: list[KeptCompletion]) -> None:
        """Keep all completions of a row, in place of those that it had."""
        self._rows[row_id] = completions

    def put_rollout(self, row_ids: Sequence[str], rollout: Rollout) -> None:
        """Keep a rollout of so many rows, each with the same number of completions."""
        samples = len(rollout.truncated) // len(row_ids)
        found = [
            KeptCompletion(ids[mask].tolist(), bool(truncated))
            for ids, mask, truncated in zip(
                rollout.completion_ids, rollout.completion_mask, rollout.truncated, strict=True
            )
        ]
        for place, row_id in enumerate(row_ids):
            self.put(row_id, found[place * samples : (place + 1) * samples])

    def rollout(self, row_ids: Sequence[str], pad_id: int, device: torch.device) -> Rollout:
        """The completions of rows as if they had just been sampled.

        Args:
            row_ids: B ids, all of them kept.
            pad_id: Padding id.
            device: Where the tensors go.

        Returns:
            The rollout; its sampled log-probabilities are not known and NaN.
        """
        kept = [completion for row_id in row_ids for completion in self._rows[row_id]]
        longest = max(len(completion.token_ids) for completion in kept)
        padded = [
            completion.token_ids + [pad_id] * (longest - len(completion.token_ids))
            for completion in kept
        ]
        ids = torch.tensor(padded)  # (R, T)
        lengths = torch.tensor([len(completion.token_ids) for completion in kept])  # (R,)
        mask = torch.arange(longest) < lengths.unsqueeze(1)  # (R, T)
        unknown = torch.full(ids.shape, torch.nan)  # (R, T)
        truncated = torch.tensor([completion.truncated for completion in kept])  # (R,)
        return Rollout(*(part.to(device) for part in (ids, mask, unknown, truncated)))

    def state(self) -> dict[str, Any]:
        """Tensors and plain values; in the order of the ids, whatever the order of making."""
        ids = sorted(self._rows)
        kept = [completion for row_id in ids for completion in self._rows[row_id]]
        tokens = [torch.tensor(completion.token_ids, dtype=torch.int32) for completion in kept]
        return {
            "row_ids": ids,
            "samples": [len(self._rows[row_id]) for row_id in ids],
            "lengths": torch.tensor([len(part) for part in tokens], dtype=torch.int32),
            "tokens": torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int32),
            "truncated": torch.tensor([completion.truncated for completion in kept]),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Keep what `state` had, and nothing else."""
        parts = state["tokens"].split(state["lengths"].tolist()) if state["row_ids"] else []
        kept = [
            KeptCompletion(part.tolist(), bool(truncated))
            for part, truncated in zip(parts, state["truncated"], strict=True)
        ]
        self._rows = {}
        start = 0
        for row_id, samples in zip(state["row_ids"], state["samples"], strict=True):
            self._rows[row_id] = kept[start : start + samples]
            start += samples

    def share(self) -> None:
        """Take over what the other ranks have; all of them must call it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, self._rows)
        # In the order of the ranks, so that all end with the same where two made the same row.
        for rows in reversed(gathered):
            self._rows = {**self._rows, **rows}


class CompletionTokens(NamedTuple):
    """What tokens a completion may have.

    Attributes:
        tokenizer: A tokenizer of transformers.
        stop_ids: Ids of which any ends a completion.
        vocabulary: Ids that the model knows; they may be more than the tokenizer has.
        longest: Most tokens that a completion may have.
    """

    tokenizer: Any
    stop_ids: list[int]
    vocabulary: int
    longest: int


class GivenCompletion(NamedTuple):
    """One line of the file.

    Attributes:
        row_id: The row that it completes.
        text: The completion, without what ends a turn; empty where there are token ids.
        token_ids: The completion as sampled, its stop token included; or None.
        truncated: Whether it ends without a stop token.
        origin: `file, line n`, for messages to the user.
    """

    row_id: str
    text: str
    token_ids: list[int] | None
    truncated: bool
    origin: str

    def keep(self, target: CompletionTokens) -> KeptCompletion:
        """Tokenize it.

        Raises:
            UserError: If it has more tokens than that, or none, or ids that there are not.
        """
        if self.token_ids is not None:
            ids = list(self.token_ids)
        else:
            ids = answer_ids(target.tokenizer, self.text)
            ids = ids if self.truncated else [*ids, target.tokenizer.eos_token_id]
        stops = [place for place, token in enumerate(ids) if token in target.stop_ids]
        ids = ids[: stops[0] + 1] if stops else ids  # as a rollout ends at its first stop token
        if not 1 <= len(ids) <= target.longest:
            raise UserError(
                f"{self.origin}: the completion has {len(ids)} tokens, allowed are 1 to "
                f"{target.longest} (model.sampling.max_new_tokens). Raise that, or shorten the "
                "completion and set truncated to true."
            )
        if not all(0 <= token < target.vocabulary for token in ids):
            raise UserError(
                f"{self.origin}: token_ids go from {min(ids)} to {max(ids)}, and the model has 0 "
                f"to {target.vocabulary - 1}. They are of another model: give the text instead."
            )
        return KeptCompletion(ids, truncated=not stops)


def read_completions(path: str, target: CompletionTokens) -> dict[str, list[KeptCompletion]]:
    """Read and tokenize the completions of each row, in the order of the file.

    Args:
        path: A JSON Lines file, e.g. the predictions.jsonl of `predict`.
        target: What tokens they may have.

    Raises:
        UserError: If there is no file, or a line has another form or does not fit.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"model.completions: there is no file {path}. Correct the path, or leave it out: the "
            "teacher then writes the completions."
        )
    # Not splitlines(): that also cuts at characters that JSON strings may hold, like U+2028.
    lines = file.read_text(encoding="utf-8").split("\n")
    found: dict[str, list[KeptCompletion]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            given = _parse(line, f"{path}, line {number}")
            found.setdefault(given.row_id, []).append(given.keep(target))
    return found


def _parse(line: str, origin: str) -> GivenCompletion:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: malformed JSON ({error}). {_FORM}") from error
    if not isinstance(found, dict):
        raise UserError(f"{origin}: got a {type(found).__name__}. {_FORM}")
    row_id, text, token_ids = found.get("id"), found.get("completion", ""), found.get("token_ids")
    if token_ids is not None:
        good = isinstance(token_ids, list) and all(type(token) is int for token in token_ids)
    else:
        good = "completion" in found and isinstance(text, str)
    if not good or not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise UserError(f"{origin}: got the keys {printable(', '.join(found)) or 'none'}. {_FORM}")
    truncated = found.get("truncated", False)
    if not isinstance(truncated, bool):
        raise UserError(f"{origin}: truncated is {shown(truncated)}, allowed are true and false.")
    return GivenCompletion(str(row_id), str(text), token_ids, truncated, origin)


def check_completions(
    given: Mapping[str, Sequence[KeptCompletion]],
    rows: Sequence[Demonstration],
    samples: int,
    path: str,
) -> None:
    """Check that each row has its completions; those of other rows are not used.

    Args:
        given: What the file holds.
        rows: The rows to train on.
        samples: Completions of each row.
        path: The file, for the message.

    Raises:
        UserError: Names the first row that has too few or too many.
    """
    for row in rows:
        count = len(given.get(row.id, ()))
        if count != samples:
            raise UserError(
                f"{row.origin}: {path} has {count} completions of the row with the id "
                f"{shown(row.id)}, model.sampling.completions_per_prompt is {samples}. Add or "
                "remove lines, or set data.columns.id to the column that holds the ids."
            )
