"""What the demonstrations themselves would score: no model can be expected to pass that."""

from __future__ import annotations

from sdft_lightning.graders import gold_self_test
from sdft_lightning.prompts import demonstration_text
from sdft_lightning.types import Demonstration


def gold_report(name: str, grader: str, rows: list[Demonstration]) -> str:
    """One line on the gold self-test of a graded set.

    Args:
        name: What the set is called.
        grader: Name of its grader.
        rows: Its rows.

    Returns:
        The line; empty where no row has a demonstration.
    """
    shown = [row for row in rows if row.demonstration]
    if not shown:
        return ""
    texts = [demonstration_text(row) for row in shown]
    found = gold_self_test(grader, [row.reference for row in shown], texts)
    line = (
        f"{name}: grader {grader}: the demonstrations themselves get {found.passed} of "
        f"{found.total} right"
    )
    if found.failing:
        line += f"; the first that fails is {shown[found.failing[0]].origin}"
    return line
