"""Our graders as metrics of the harness's tasks, for `process_results` of a task YAML."""

from __future__ import annotations

from typing import Any

from sdft_lightning.graders import get_grader


def contains(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether an answer contains one of the texts in the column `reference`.

    Args:
        doc: The item.
        results: The answer.

    Returns:
        `acc`, 0 or 1.
    """
    return {"acc": get_grader("contains")(results[0], doc["reference"])}
