"""The graders by name, the check of a row's reference, and of gold answers, before training."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from sdft_lightning.errors import UserError, printable
from sdft_lightning.graders.choice import choice, reference_letter
from sdft_lightning.graders.judge import Answer, Judge
from sdft_lightning.graders.rubrics import JUDGED, judge_reference, token_f1
from sdft_lightning.graders.texts import accepted_texts, contains, exact
from sdft_lightning.graders.tool_call import (
    reference_calls,
    render_calls,
    tool_call,
    tool_call_released,
)
from sdft_lightning.types import Demonstration, Message

Grader = Callable[[str, Any], float]
"""(completion text, reference) -> score in [0, 1]; a reference of the wrong form raises."""

GRADERS: dict[str, Grader] = {
    "contains": contains,
    "exact": exact,
    "choice": choice,
    "token_f1": token_f1,
    "tool_call": tool_call,
    "tool_call_released": tool_call_released,
}

_REFERENCE_FORMS: dict[str, Callable[[Any], object]] = {
    "contains": accepted_texts,
    "exact": accepted_texts,
    "choice": reference_letter,
    "token_f1": judge_reference,
    "tool_call": reference_calls,
    "tool_call_released": reference_calls,
    **dict.fromkeys(JUDGED, judge_reference),
}


def grader_names() -> list[str]:
    """All names that the option `grader` takes."""
    return sorted([*GRADERS, *JUDGED])


def get_grader(name: str) -> Grader:
    """Return the grader called `name`, of those that need no judge.

    Args:
        name: one of `grader_names()`, or the dotted path of a function of the user's own,
            `package.module.function`, which is imported.

    Raises:
        UserError: no grader has that name, or the path leads to no function.
    """
    if name in JUDGED:
        raise UserError(
            f"grader: {name!r} asks a judge and none is given. Set data.judge (its model, and its "
            f"base_url unless it is OpenAI's), or use {JUDGED[name].offline!r}, which needs no "
            "endpoint."
        )
    if name in GRADERS:
        return GRADERS[name]
    if is_dotted(name):
        return _imported(name)
    raise UserError(
        f"grader must be one of {', '.join(grader_names())}; got {name!r}. "
        "Correct the option `grader`, give the dotted path of a function of your own "
        "(package.module.function), or add it to sdft_lightning.graders.GRADERS under that name."
    )


def is_dotted(name: object) -> bool:
    """Whether a grader's name is the path of a function, as Python writes it."""
    parts = name.split(".") if isinstance(name, str) else []
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _imported(name: str) -> Grader:
    module, _, function = name.rpartition(".")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"grader: {name} cannot be imported: {printable(str(error))}. Give package.module."
            "function of a module that this Python finds (PYTHONPATH=. finds those in this folder)."
        ) from error
    if not callable(found):
        raise UserError(
            f"grader: {name} is a {type(found).__name__}, and no function. It is called with "
            "(completion text, reference) and returns a score in [0, 1]."
        )
    grader: Grader = found
    return grader


def grade_rows(
    name: str, texts: Sequence[str], rows: Sequence[Demonstration], judge: Judge | None = None
) -> list[float]:
    """Grade the completions of some rows.

    Args:
        name: the grader.
        texts: one completion a row.
        rows: their rows; `reference`, and for a judge `prompt`, are read.
        judge: what the graders of `JUDGED` ask.

    Returns:
        One score in [0, 1] for each row; NaN where a judge gave no verdict.

    Raises:
        UserError: unknown grader, or one that asks a judge and there is none.
    """
    if name in JUDGED and judge is not None:
        return judge.grade(name, judged_answers(texts, rows))
    grade = get_grader(name)
    return [grade(text, row.reference) for text, row in zip(texts, rows, strict=True)]


def judged_answers(texts: Sequence[str], rows: Sequence[Demonstration]) -> list[Answer]:
    """What a judge is shown of some rows and their completions."""
    return [
        Answer(_question(row.prompt), judge_reference(row.reference), text)
        for text, row in zip(texts, rows, strict=True)
    ]


def _question(prompt: list[Message]) -> str:
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


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
    if name not in JUDGED:
        get_grader(name)
    form = _REFERENCE_FORMS.get(name)
    if form is None:
        return
    try:
        form(reference)
    except ValueError as error:
        raise UserError(f"{where}: grader {name!r}: {error}") from error


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
