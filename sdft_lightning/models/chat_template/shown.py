"""Whether a rendered conversation holds every text, and ids of a text that goes on."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sdft_lightning.models.chat_template.apply import render
from sdft_lightning.models.chat_template.turns import every_turn_texts
from sdft_lightning.types import Message

# Templates write these anew, or take them out: around thoughts, and switches of thinking.
_REWRITTEN = re.compile(
    r"</?think(?:ing)?>|</?thought>|\[/?THINK\]|</?seed:think>|<\|(?:START|END)_THINKING\|>"
    r"|<\|(?:begin|end)_of_thought\|>|<\|channel\|>\w+<\|message\|>|<\|end\|><\|start\|>assistant"
    r"|/(?:no_)?think\b"
)
_BLANK = re.compile(r"\s+")


class Missing(NamedTuple):
    """A text that a conversation lacks.

    Attributes:
        message: The message that it is from.
        text: The text; of a message with thoughts, the part.
        is_thought: Whether it is a thought, or what stands before one.
    """

    message: Message
    text: str
    is_thought: bool


def first_missing(messages: Sequence[Message], rendered: str) -> Missing | None:
    """The first text of a conversation that its rendering lacks, however often it should hold it.

    Templates strip texts, escape them for HTML or JSON, change blanks, merge turns, move the system
    turn, and write thoughts apart; none of that counts as lacking.

    Args:
        messages: What was rendered.
        rendered: The rendered text.
    """
    contents = [str(message["content"]) for message in messages]
    if _stand_in_turn(contents, rendered):
        return None
    if all(_count(rendered, text.strip()) >= _wanted(text.strip(), contents) for text in contents):
        return None
    parts = [
        (message, part.strip(), is_thought)
        for message, content in zip(messages, contents, strict=True)
        for part, is_thought in _parts(content)
        if part.strip()
    ]
    forms = [_compact(form) for form in (rendered, html.unescape(rendered))]
    all_parts = [_compact(part) for _, part, _ in parts]
    for message, part, is_thought in parts:
        if not _stands(part, forms, all_parts):
            return Missing(message, part, is_thought)
    return None


def _stand_in_turn(contents: Iterable[str], rendered: str) -> bool:
    """Whether each text stands as it is behind the one before, as it usually does."""
    end = 0
    for content in contents:
        text = content.strip()
        start = rendered.find(text, end)
        if start < 0:
            return False
        end = start + len(text)
    return True


def _parts(content: str) -> list[tuple[str, bool]]:
    """A text cut at the markers of thoughts; whether each part stands before the last of them."""
    *thoughts, said = _REWRITTEN.split(content)
    return [*((part, True) for part in thoughts), (said, False)]


def _stands(part: str, forms: Iterable[str], all_parts: list[str]) -> bool:
    """Whether a part stands in one of the forms of a text, as it is or escaped for JSON."""
    compact = _compact(part)
    wanted = _wanted(compact, all_parts)
    written = {compact} | {
        _compact(json.dumps(part, ensure_ascii=ascii_only)[1:-1]) for ascii_only in (True, False)
    }
    return any(sum(form.count(each) for each in written) >= wanted for form in forms)


def _wanted(text: str, contents: Iterable[str]) -> int:
    return sum(_count(content, text) for content in contents) if text else 0


def _count(text: str, part: str) -> int:
    return text.count(part) if part else 0


def _compact(text: str) -> str:
    return _BLANK.sub("", text)


def shows(rendered: str, text: str) -> bool:
    """Whether one text stands in a rendering, see `first_missing`."""
    return first_missing([{"role": "assistant", "content": text}], rendered) is None


def continuation_ids(
    tokenizer: Any, text: str, prompt_ids: list[int], whole_ids: list[int]
) -> list[int]:
    """Token ids of a text behind a prompt.

    Args:
        tokenizer: A tokenizer of transformers.
        text: What follows the prompt.
        prompt_ids: Ids of the prompt alone: what is sampled from.
        whole_ids: Ids of prompt and text as one text.

    Returns:
        The rest of the whole, so that both together are its ids. Where the tokenizer merges across
        the boundary there is no such rest; then the ids of the text alone, without the blank that
        some tokenizers (SentencePiece) write before a text.
    """
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return whole_ids[len(prompt_ids) :]
    for anchor in ("\n", "."):
        before, both = _encoded(tokenizer, anchor), _encoded(tokenizer, anchor + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return _encoded(tokenizer, text)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of an answer, as they are behind a prompt of the model.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The answer, without what ends a turn. Where the chat template writes a blank before
            answers, it may be left out.
    """
    if not text:
        return []
    known = every_turn_texts(tokenizer)
    if known:
        prompt, lead = known[0].asked, known[0].lead
    else:
        prompt, lead = render(tokenizer, [{"role": "user", "content": "?"}], {}), " "
    if lead.isspace() and not text[0].isspace():
        text = lead + text
    whole = _encoded(tokenizer, prompt + text)
    return continuation_ids(tokenizer, text, _encoded(tokenizer, prompt), whole)
