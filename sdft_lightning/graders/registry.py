"""The graders by name, and the check of a row's reference before training."""

from collections.abc import Callable
from typing import Any

from sdft_lightning.errors import UserError
from sdft_lightning.graders.accepted import accepted_texts
from sdft_lightning.graders.choice import choice, reference_letter
from sdft_lightning.graders.contains import contains
from sdft_lightning.graders.exact import exact
from sdft_lightning.graders.tool_call import tool_call
from sdft_lightning.graders.tool_call_released import reference_calls, tool_call_released

Grader = Callable[[str, Any], float]
"""(completion text, reference) -> score in [0, 1]; a reference of the wrong form raises."""

GRADERS: dict[str, Grader] = {
    "contains": contains,
    "exact": exact,
    "choice": choice,
    "tool_call": tool_call,
    "tool_call_released": tool_call_released,
}

_REFERENCE_FORMS: dict[str, Callable[[Any], object]] = {
    "contains": accepted_texts,
    "exact": accepted_texts,
    "choice": reference_letter,
    "tool_call": reference_calls,
    "tool_call_released": reference_calls,
}


def get_grader(name: str) -> Grader:
    """Return the grader called `name`.

    Raises:
        UserError: no grader has that name.
    """
    if name not in GRADERS:
        raise UserError(
            f"grader must be one of {', '.join(GRADERS)}; got {name!r}. "
            "Correct the option `grader`, or add your own function to "
            "sdft_lightning.graders.GRADERS under that name."
        )
    return GRADERS[name]


def check_reference(name: str, reference: object, where: str) -> None:
    """Raise if `reference` has not the form that grader `name` needs.

    A grader that was added to `GRADERS` by the user has no known form and is not checked.

    Args:
        name: the grader.
        reference: the row's reference.
        where: the row as the user finds it, such as "train.jsonl, row 12".

    Raises:
        UserError: the grader is unknown, or the form is wrong; the text says where, what
            form is needed, what was found and how to mend it.
    """
    get_grader(name)
    form = _REFERENCE_FORMS.get(name)
    if form is None:
        return
    try:
        form(reference)
    except ValueError as error:
        raise UserError(f"{where}: grader {name!r}: {error}") from error
