"""Requests of benchmarks in batches: contexts kept together, the longest first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import Dataset

from sdft_lightning.data.batches import pad
from sdft_lightning.types import GenerationBatch, ScoringBatch

if TYPE_CHECKING:
    from sdft_lightning.data.benchmarks.harness_model import Part, Prompt

# Padded tokens of continuations in a batch, so that long texts come a few at a time.
_TOKENS = 1 << 14
# Choices up to this length stay together with a longer one, so that their context is computed once.
_SHORT = 64


class ScoringPlan:
    """Contexts with the continuations that follow each."""

    def __init__(self) -> None:
        self.contexts: list[list[int]] = []
        self.rows: list[tuple[int, list[int], int]] = []  # owner, continuation, request

    def collate(self, pad_id: int) -> ScoringBatch:
        """Pad contexts on the left and continuations on the right."""
        context_ids, context_mask = pad(self.contexts, pad_id, "left")  # (C, P)
        ids, mask = pad([row[1] for row in self.rows], pad_id, "right")  # (R, T)
        owner = torch.tensor([row[0] for row in self.rows], dtype=torch.long)  # (R,)
        return ScoringBatch(context_ids, context_mask, ids, mask, owner, [r[2] for r in self.rows])


class GenerationPlan:
    """Prompts with the same settings."""

    def __init__(self, rows: list[tuple[Prompt, int, int]]) -> None:
        self.rows = rows  # prompt, request, copy

    def collate(self, pad_id: int) -> GenerationBatch:
        """Pad prompts on the left."""
        ids, mask = pad([row[0].ids for row in self.rows], pad_id, "left")  # (B, P)
        settings = self.rows[0][0].settings
        return GenerationBatch(
            ids, mask, settings, [row[1] for row in self.rows], [row[2] for row in self.rows]
        )


def scoring_plans(requests: list[list[Part]], batch_size: int) -> Iterator[ScoringPlan]:
    """Batches as large as `batch_size` rows of a context and one continuation, like with like.

    A context is computed once for all its continuations, so more of them fit into as many tokens
    as so many plain rows would take.

    Args:
        requests: The parts of each request.
        batch_size: Plain rows of which a batch has no more tokens.

    Yields:
        Batches with long continuations first, then those of short ones; within both the contexts
        with most tokens first.
    """
    groups: dict[tuple[int, ...], list[tuple[list[int], int]]] = {}
    for request, parts in enumerate(requests):
        for part in parts:
            groups.setdefault(tuple(part.context), []).append((part.continuation, request))
    chunks = [
        _Chunk(context, part)
        for context, rows in groups.items()
        for part in _split(rows, batch_size)
    ]
    chunks.sort(key=lambda chunk: (chunk.longest > _SHORT, chunk.tokens), reverse=True)
    plan = ScoringPlan()
    tokens = plain = 0  # of the plan's longest row, with all of its continuations and with one
    for chunk in chunks:
        if plan.rows:
            longest = max(len(row[1]) for row in plan.rows)
            widest = max(longest, chunk.longest)
            rows = len(plan.rows) + len(chunk.rows)
            unlike = _unlike(min(longest, chunk.longest), widest)
            room = batch_size * max(plain, chunk.plain)
            full = (len(plan.contexts) + 1) * max(tokens, chunk.tokens) > room
            if full or rows * widest > _TOKENS or unlike:
                yield plan
                plan = ScoringPlan()
        if not plan.rows:
            tokens, plain = 0, 0
        tokens, plain = max(tokens, chunk.tokens), max(plain, chunk.plain)
        owner = len(plan.contexts)
        plan.rows += [(owner, continuation, request) for continuation, request in chunk.rows]
        plan.contexts.append(list(chunk.context))
    if plan.rows:
        yield plan


def _split(
    rows: list[tuple[list[int], int]], batch_size: int
) -> Iterator[list[tuple[list[int], int]]]:
    """Cut the continuations of a context where they are too many, or too unlike in length."""
    rows = sorted(rows, key=lambda row: len(row[0]), reverse=True)
    part: list[tuple[list[int], int]] = []
    for row in rows:
        if part:
            longest = len(part[0][0])
            full = len(part) == batch_size or (len(part) + 1) * longest > _TOKENS
            if full or _unlike(len(row[0]), longest):
                yield part
                part = []
        part.append(row)
    yield part


class _Chunk(NamedTuple):
    """A context and continuations of it, the longest first, each with its request."""

    context: tuple[int, ...]
    rows: list[tuple[list[int], int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest continuation."""
        return len(self.rows[0][0])

    @property
    def tokens(self) -> int:
        """Tokens of the context and all its continuations."""
        return len(self.context) + sum(len(continuation) for continuation, _ in self.rows)

    @property
    def plain(self) -> int:
        """Tokens of the context and the longest continuation."""
        return len(self.context) + self.longest


def _unlike(length: int, longest: int) -> bool:
    """Whether a continuation would be mostly padding beside the longest."""
    return longest > _SHORT and 2 * length < longest


def generation_plans(prompts: list[Prompt], batch_size: int) -> Iterator[GenerationPlan]:
    """Batches of up to `batch_size` prompts with the same settings, the longest first."""
    by_settings: dict[Any, list[tuple[Prompt, int, int]]] = {}
    for request, prompt in enumerate(prompts):
        rows = by_settings.setdefault(prompt.settings, [])
        rows += [(prompt, request, copy) for copy in range(prompt.copies)]
    for rows in by_settings.values():
        rows.sort(key=lambda row: len(row[0].ids), reverse=True)
        for i in range(0, len(rows), batch_size):
            yield GenerationPlan(rows[i : i + batch_size])


class RequestDataset(Dataset[ScoringBatch | GenerationBatch]):
    """Batches of requests; an index is a list of one number, as `EvaluationSampler` gives."""

    def __init__(self, plans: list[ScoringPlan | GenerationPlan], pad_id: int) -> None:
        self.plans = plans
        self.pad_id = pad_id

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.plans)

    def __getitem__(self, index: list[int]) -> ScoringBatch | GenerationBatch:
        """Pad a batch; one without rows for a number behind the last, for ranks without any."""
        if index[0] >= len(self.plans):
            return ScoringPlan().collate(self.pad_id)
        return self.plans[index[0]].collate(self.pad_id)
