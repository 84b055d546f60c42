"""Where a model's thoughts begin and end in its text, and its answer without them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class Markers(NamedTuple):
    """What stands before and behind a thought."""

    opening: str
    closing: str


_THINK = Markers("<think>", "</think>")
# Looked for where the chat template or the vocabulary has them.
_KNOWN = (
    Markers("[THINK]", "[/THINK]"),
    Markers("<thinking>", "</thinking>"),
    Markers("<thought>", "</thought>"),
    Markers("<seed:think>", "</seed:think>"),
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),
    Markers("<|begin_of_thought|>", "<|end_of_thought|>"),
    # gpt-oss: what it says on other channels, up to the answer on the last.
    Markers("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
_OPENER = re.compile(r"<([A-Za-z][\w:-]*)>\s*$")


def thought_markers(tokenizer: Any, header: str = "", answered: str = "") -> list[Markers]:
    """The markers of a model's thoughts.

    Args:
        tokenizer: A tokenizer of transformers.
        header: What its chat template writes to open the assistant's turn.
        answered: What it writes before an answer that is given.

    Returns:
        `<think>` always; others that the chat template or the vocabulary knows, or that the header
        opens, though nothing of the kind stands before an answer that is given.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = getattr(tokenizer, "added_tokens_encoder", {})
    found = [_THINK]
    for pair in _KNOWN:
        tokens = re.findall(r"<\|[^|]+\|>", pair.opening) if "channel" in pair.opening else pair
        if all(token in added or token in template for token in tokens):
            found.append(pair)
    opened = _OPENER.search(header)
    if opened and not answered.rstrip().endswith(opened[0].strip()):
        found.append(Markers(f"<{opened[1]}>", f"</{opened[1]}>"))
    return list(dict.fromkeys(found))


def opens_thought(text: str, markers: Sequence[Markers]) -> Markers | None:
    """The markers of the thought in which a text ends; None where it ends in none."""
    for pair in markers:
        if text.rfind(pair.opening) > text.rfind(pair.closing):
            return pair
    return None


def without_thoughts(text: str, markers: Sequence[Markers], opened: Markers | None = None) -> str:
    """What is said besides thoughts; a thought that never ends hides all that follows.

    Args:
        text: What a model wrote.
        markers: See `thought_markers`.
        opened: The markers of a thought that the prompt has opened.
    """
    if opened is not None:
        text = opened.opening + text
    for pair in markers:
        if pair.opening in text or pair.closing in text:
            text = _without(text, pair).lstrip()
    return text


def _without(text: str, pair: Markers) -> str:
    said = ""
    while True:
        before, closing, after = text.partition(pair.closing)
        if pair.opening in before:
            said += before.partition(pair.opening)[0]
        elif closing:
            said = ""  # the thought began without its marker
        else:
            return said + text
        text = after
