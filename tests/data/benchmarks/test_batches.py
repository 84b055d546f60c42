"""How requests become batches: nothing lost, and no more tokens than plain rows would take."""

from __future__ import annotations

import random

import pytest

from sdft_lightning.data.benchmarks.batches import ScoringPlan, scoring_plans
from sdft_lightning.data.benchmarks.harness_model import Part


def requests(shapes: list[tuple[int, list[int]]]) -> list[list[Part]]:
    """Contexts of so many tokens, each with continuations of so many."""
    return [
        [Part([number] * context, [7] * length)]
        for number, (context, lengths) in enumerate(shapes)
        for length in lengths
    ]


def tokens(plan: ScoringPlan) -> int:
    """Tokens of the padded batch, a context's continuations behind it in one row."""
    rows = [len(context) for context in plan.contexts]
    for owner, continuation, _ in plan.rows:
        rows[owner] += len(continuation)
    return len(rows) * max(rows)


def test_a_shared_context_leaves_room_for_more() -> None:
    plans = list(scoring_plans(requests([(20, [10] * 4)] * 8), batch_size=8))
    assert [len(plan.rows) for plan in plans] == [16, 16]  # 4 rows of 60 tokens, as 8 of 30


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_single_continuations_are_as_many_as_asked_for(batch_size: int) -> None:
    plans = list(scoring_plans(requests([(20, [10])] * 33), batch_size))
    assert max(len(plan.rows) for plan in plans) == batch_size


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_no_request_is_lost_and_no_batch_is_larger_than_plain_rows(batch_size: int) -> None:
    draw = random.Random(batch_size)
    shapes = [
        (draw.randint(1, 300), [draw.randint(1, 200) for _ in range(draw.randint(1, 9))])
        for _ in range(60)
    ]
    asked = requests(shapes)
    plans = list(scoring_plans(asked, batch_size))
    found = sorted(row[2] for plan in plans for row in plan.rows)
    assert found == list(range(len(asked)))
    for plan in plans:
        plain = max(len(plan.contexts[owner]) + len(text) for owner, text, _ in plan.rows)
        assert tokens(plan) <= batch_size * plain
