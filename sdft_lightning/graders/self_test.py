"""Does a grader call the gold answers correct?"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sdft_lightning.errors import UserError
from sdft_lightning.graders.accepted import accepted_texts
from sdft_lightning.graders.choice import reference_letter
from sdft_lightning.graders.judge import JUDGED, judge_reference
from sdft_lightning.graders.registry import get_grader
from sdft_lightning.graders.tool_call_released import render_calls

_GOLD_TEXTS: dict[str, Callable[[Any], str]] = {
    "contains": lambda reference: accepted_texts(reference)[0],
    "exact": lambda reference: accepted_texts(reference)[0],
    "choice": reference_letter,
    "token_f1": judge_reference,
    "tool_call": render_calls,
    "tool_call_released": render_calls,
    **dict.fromkeys(JUDGED, judge_reference),
}


class GoldSelfTest(NamedTuple):
    """Outcome of a gold self-test.

    Attributes:
        passed: number of gold texts with the full score.
        total: number of gold texts.
        failing: indices of the others, ascending.
    """

    passed: int
    total: int
    failing: list[int]


def gold_text(name: str, reference: Any) -> str | None:
    """Return the right completion as `reference` alone tells it, for a row with no demonstration.

    Args:
        name: the grader; of a user's own nothing is known, so None.
        reference: the row's reference.

    Raises:
        UserError: the reference has not the form that the grader needs.
    """
    render = _GOLD_TEXTS.get(name)
    return None if render is None else render(reference)


def gold_self_test(name: str, references: Sequence[Any], gold_texts: Sequence[str]) -> GoldSelfTest:
    """Grade the gold texts themselves: what is missing from `total` no model can reach.

    Args:
        name: the grader.
        references: one reference a row.
        gold_texts: the right completion of the same rows, in the same order.

    Raises:
        UserError: unknown grader, a reference of the wrong form, or unequal lengths.
    """
    if len(references) != len(gold_texts):
        raise UserError(
            f"references and gold_texts must have one entry a row each; got {len(references)} "
            f"and {len(gold_texts)}. Build both from the same rows."
        )
    grader = get_grader(name)
    pairs = zip(gold_texts, references, strict=True)
    failing = [i for i, (text, reference) in enumerate(pairs) if grader(text, reference) < 1.0]
    return GoldSelfTest(len(gold_texts) - len(failing), len(gold_texts), failing)
