"""Tokenized rows, padded into a `PromptBatch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sdft_lightning.data.tokens import TokenizedRow
from sdft_lightning.types import PromptBatch


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to the longest.

    Args:
        rows: B rows.
        pad_id: What fills them up; it may also be a real token, the mask tells them apart.
        side: Where the padding goes.

    Returns:
        Ids `(B, L)` and their mask `(B, L)`.
    """
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)  # (B, L)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)  # (B, L)
    for place, row in enumerate(rows):
        columns = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[place, columns] = torch.tensor(row, dtype=torch.long)
        mask[place, columns] = True
    return ids, mask


def collate(
    rows: Sequence[TokenizedRow],
    pad_id: int,
    task: str,
    grader: str = "",
    window: Sequence[PromptBatch] = (),
) -> PromptBatch:
    """Make a batch of rows.

    Args:
        rows: B rows.
        pad_id: Padding id.
        task: Name of the data set.
        grader: Name of its grader; empty for none.
        window: The later micro-batches of the accumulation window, on its first.

    Returns:
        The batch; a row without demonstration has a teacher prompt of no tokens.
    """
    prompt_ids, prompt_mask = pad([row.prompt_ids for row in rows], pad_id, "left")
    teacher_ids, teacher_mask = pad([row.teacher_prompt_ids for row in rows], pad_id, "left")
    target_ids, target_mask = pad([row.demonstration_ids for row in rows], pad_id, "right")
    context_ids, context_mask = pad([row.context_ids for row in rows], pad_id, "right")
    return PromptBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        teacher_prompt_ids=teacher_ids,
        teacher_prompt_mask=teacher_mask,
        demonstration_ids=target_ids,
        demonstration_mask=target_mask,
        context_ids=context_ids,
        context_mask=context_mask,
        rows=[row.row for row in rows],
        task=task,
        grader=grader,
        window=list(window),
    )
