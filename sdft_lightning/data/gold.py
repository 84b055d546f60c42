"""What the right answers themselves would score: no model can be expected to pass that."""

from __future__ import annotations

from collections.abc import Sequence

from sdft_lightning.data.prompts import demonstration_text
from sdft_lightning.graders import (
    JUDGED,
    GoldSelfTest,
    Judge,
    gold_self_test,
    gold_text,
    judged_answers,
)
from sdft_lightning.models.chat_template import Markers, without_thoughts
from sdft_lightning.types import Demonstration


def gold_report(
    name: str,
    grader: str,
    rows: list[Demonstration],
    judge: Judge | None = None,
    thoughts: Sequence[Markers] = (),
) -> str:
    """One line on the gold self-test of a graded set.

    Args:
        name: What the set is called.
        grader: Name of its grader.
        rows: Its rows; of those with a demonstration that is graded, and where no row has one, what
            the references alone tell.
        judge: Asked by the graders that ask, about the first rows only.
        thoughts: Markers of the thoughts that graders are spared.

    Returns:
        The line; empty where nothing is known to be right.

    Raises:
        UserError: If the judge cannot be asked.
    """
    shown = [row for row in rows if row.demonstration]
    kind = "demonstrations"
    if shown:
        texts = [without_thoughts(demonstration_text(row), thoughts) for row in shown]
    else:
        kind = "references"
        rendered = [(row, gold_text(grader, row.reference)) for row in rows]
        shown = [row for row, text in rendered if text is not None]
        texts = [text for _, text in rendered if text is not None]
    if not shown:
        return ""
    if judge is not None and grader in JUDGED:
        count = judge.settings.gold_rows
        shown, texts = shown[:count], texts[:count]
        scores = judge.check(grader, judged_answers(texts, shown))
        failing = [i for i, score in enumerate(scores) if score < 1.0]
        found = GoldSelfTest(len(scores) - len(failing), len(scores), failing)
    else:
        found = gold_self_test(grader, [row.reference for row in shown], texts)
    line = (
        f"{name}: grader {grader}: the {kind} themselves get {found.passed} of {found.total} right"
    )
    if found.failing:
        line += f"; the first that fails is {shown[found.failing[0]].origin}"
    return line
