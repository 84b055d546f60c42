"""`tool_call_released`: scores tool calls as the paper's public evaluation does.

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
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sdft_lightning.errors import UserError
from sdft_lightning.errors.foreign_text import shown

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
