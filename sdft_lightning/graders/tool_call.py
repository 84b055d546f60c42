"""`tool_call`, strict, and `tool_call_released`, as the paper's public evaluation scores.

Rewritten from the behaviour of `eval_tooluse.py` in idanshen/Self-Distillation, so that figures
compare with published ones. Its weaknesses are kept on purpose:

- A name is the run of letters, digits and underscores behind `Action:` (spaces and line breaks
  between are skipped). `Action: get-user` is read as "get"; `Action: **getUser**` and
  `**Action:** getUser` are not read; `Action:` with nothing behind it takes the next line's word.
- Arguments go from the brace behind `Action Input:` to the *first* closing brace. An argument
  that is itself an object is thus cut short, is not JSON any more, and is dropped in silence, as
  is any malformed JSON. A golden argument string that is not a JSON object is dropped too.
- The arguments of all calls are poured into one dictionary, later ones over earlier ones: which
  call an argument belongs to is not seen. Their order does not count.
- Names count as a multiset: order does not count, number does.
- Values are compared by Python's `==`: 1 equals 1.0 and true, not "1".

On the 97 items of the released evaluation set it rejects two gold answers.

What differs from `tool_call_released`: arguments are read as whole JSON values, so that objects
within objects count; each call keeps its own arguments; calls are compared in order; a golden
action that is marked "[Optional]" may be left out; values must have the same type; a call
without readable arguments is wrong instead of being dropped.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdft_lightning.errors import UserError, shown

_NAME = re.compile(r"Action:\s*(?P<name>\w+)")
_ARGUMENTS = re.compile(r"Action Input:\s*(?P<json>\{[^}]*\})")
_FORM = (
    "the reference must be a list of at least one call, "
    '{"Action": tool name, "Action_Input": arguments as a JSON string}'
)
_REMEDY = (
    "Take the field `golden_answer` as the reference, with each Action_Input as text, such as "
    '[{"Action": "getFacts", "Action_Input": "{\\"limit\\": 5}"}].'
)


def tool_call_released(text: str, reference: object) -> float:
    """Return 1.0 if names and merged arguments both equal those of the reference, else 0.0.

    Args:
        text: the completion, with lines `Action: NAME` and `Action Input: {...}`.
        reference: the data set's `golden_answer`: a list of {"Action", "Action_Input"}, both
            str. Action_Input may be malformed JSON, as in some published rows.

    Raises:
        UserError: the reference has another form.
    """
    calls = reference_calls(reference)
    names = Counter(found["name"] for found in _NAME.finditer(text))
    arguments = _merge([found["json"] for found in _ARGUMENTS.finditer(text)])
    same_names = names == Counter(call["Action"] for call in calls)
    same_arguments = arguments == _merge([call["Action_Input"] for call in calls])
    return float(same_names and same_arguments)


def reference_calls(reference: object) -> list[Mapping[str, str]]:
    """Return the golden calls, checked for their form.

    Raises:
        UserError: not a list of at least one {"Action": str, "Action_Input": str}.
    """
    if not isinstance(reference, list | tuple) or not reference:
        raise UserError(f"{_FORM}; got {shown(reference)}. {_REMEDY}")
    for call in reference:
        if not isinstance(call, Mapping) or not call.get("Action"):
            raise UserError(f"{_FORM}; got the call {shown(call)}. {_REMEDY}")
        for key in ("Action", "Action_Input"):
            if not isinstance(call.get(key), str):
                raise UserError(f"{_FORM}; got {key} = {shown(call.get(key))}. {_REMEDY}")
    return list(reference)


def render_calls(reference: object) -> str:
    """Return the golden calls as the text that the evaluation reads, two lines a call."""
    return "\n".join(
        f"Action: {call['Action']}\nAction Input: {call['Action_Input']}"
        for call in reference_calls(reference)
    )


def _merge(json_texts: Sequence[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for json_text in json_texts:
        try:
            arguments = json.loads(json_text)
        except (ValueError, RecursionError):  # RecursionError: brackets thousands deep
            continue
        if isinstance(arguments, dict):
            merged.update(arguments)
    return merged


_OPTIONAL = re.compile(r"\[optional\]\s*", re.IGNORECASE)
# The name keeps the blanks around it: blanks that either of two repetitions could take let the time
# for a long run of them grow with its cube.
_ACTION = re.compile(
    r"^[ \t]*Action:(?P<name>[^\n]*?)(?:\n\s*)?"
    r"Action Input:[ \t]*(?:\n[ \t]*(?=[{\[]))?",
    re.MULTILINE,
)
_ACTION_LINE = re.compile(r"^[ \t]*Action:", re.MULTILINE)
_UNREADABLE = object()


class _Call(NamedTuple):
    """A call, its arguments as JSON value, or as text where the gold itself is not JSON."""

    name: str
    arguments: Any
    text: str
    optional: bool


def tool_call(text: str, reference: object) -> float:
    """Return 1.0 if the calls in `text` are those of the reference, in order, else 0.0.

    A call is a line `Action: NAME` followed by `Action Input: JSON`; the JSON may go over several
    lines, what stands behind it is ignored. Text before, between and after calls is free. An
    `Action:` line without `Action Input:` makes the whole completion wrong. Numbers compare by
    value (1 equals 1.0), but not with true or "1". Arguments may stand in any order within a call.
    Where a golden Action_Input is not JSON itself (some published rows), the text of the line must
    be the same, white space folded.

    Args:
        text: the completion.
        reference: a list of {"Action", "Action_Input"}, both str; an Action that begins with
            "[Optional]" may be missing from `text`.

    Raises:
        UserError: the reference has another form.
    """
    gold = [_gold(call["Action"], call["Action_Input"]) for call in reference_calls(reference)]
    found = _find_calls(text)
    return float(found is not None and _matches(found, gold))


def _gold(action: str, arguments: str) -> _Call:
    name = _OPTIONAL.sub("", action).strip()
    value = _whole_json(arguments)
    return _Call(name, value, _fold(arguments), name != action.strip())


def _find_calls(text: str) -> list[_Call] | None:
    """The calls in order; None where an action has no input."""
    calls, end = [], 0
    for found in _ACTION.finditer(text):
        if found.start() < end:  # inside the arguments of the call before
            continue
        value, end = _json_at(text, found.end())
        line = text[found.end() :].split("\n", 1)[0]
        name = _OPTIONAL.sub("", found["name"]).strip()
        calls.append(_Call(name, value, _fold(line), False))
    outside = _ACTION_LINE.findall(text)
    return calls if len(outside) == len(calls) else None


def _json_at(text: str, start: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return _UNREADABLE, start


def _whole_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _UNREADABLE


def _fold(text: str) -> str:
    return " ".join(text.split())


def _matches(found: Sequence[_Call], gold: Sequence[_Call]) -> bool:
    """Whether `found` is `gold` in order, with any of the optional calls left out."""
    reached = {0}  # how many of `found` the gold calls so far can account for
    for call in gold:
        taken = {i + 1 for i in reached if i < len(found) and _same_call(found[i], call)}
        reached = taken | (reached if call.optional else set())
    return len(found) in reached


def _same_call(found: _Call, gold: _Call) -> bool:
    if found.name != gold.name:
        return False
    if gold.arguments is _UNREADABLE:
        return found.text == gold.text
    return found.arguments is not _UNREADABLE and _same_value(found.arguments, gold.arguments)


def _same_value(found: Any, gold: Any) -> bool:
    """Equality without Python's `1 == True`."""
    if isinstance(found, bool) or isinstance(gold, bool):
        return found is gold
    if isinstance(found, dict) and isinstance(gold, dict):
        return found.keys() == gold.keys() and all(_same_value(found[k], gold[k]) for k in gold)
    if isinstance(found, list) and isinstance(gold, list):
        return len(found) == len(gold) and all(map(_same_value, found, gold))
    return bool(found == gold)
