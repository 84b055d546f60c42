"""What a chat template writes around turns and thoughts: where answers begin and end."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sdft_lightning.errors import UserError
from sdft_lightning.models.chat_template.apply import Conversation, try_all
from sdft_lightning.types import Message


class Markers(NamedTuple):
    """What stands before and behind a thought."""

    opening: str
    closing: str


_THINK = Markers("<think>", "</think>")
# Looked for where the chat template or the vocabulary has them.
_MARKERS = (
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
    for pair in _MARKERS:
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


log = logging.getLogger(__name__)

_QUESTION: Message = {"role": "user", "content": "SDFTQUESTION"}
_ANSWER: Message = {"role": "assistant", "content": "SDFTANSWER"}
_SYSTEM: Message = {"role": "system", "content": "SDFTSYSTEM"}


# Of each tokenizer, while its chat template stays the same.
_KNOWN: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class TurnTexts(NamedTuple):
    """What a chat template writes around an answer to a question; empty where it shows none.

    Attributes:
        asked: The question, with the header of the answer.
        header: What the generation prompt adds to the question.
        before: What stands before the answer in a conversation that holds it.
        behind: What stands behind it.
        with_system: A system turn and the question; empty where the template refuses one.
    """

    asked: str
    header: str
    before: str
    behind: str
    with_system: str

    @property
    def lead(self) -> str:
        """What stands between the header and the answer; empty where they do not fit together."""
        return self.before[len(self.asked) :] if self.before.startswith(self.asked) else ""


def turn_texts(tokenizer: Any, args: dict[str, Any] | None = None) -> TurnTexts:
    """What the chat template writes around a question and its answer.

    Args:
        tokenizer: A tokenizer of transformers.
        args: Arguments of the chat template.
    """
    args = args or {}
    found = []
    for messages, generation_prompt in (
        ([_QUESTION], True),
        ([_QUESTION], False),
        ([_QUESTION, _ANSWER], False),
        ([_SYSTEM, _QUESTION], True),
    ):
        # One by one: a template that exceeds a limit at one conversation is asked for the next.
        (result,) = try_all(tokenizer, [Conversation(messages, args, generation_prompt)])
        found.append(result.text or "")
    asked, bare, answered, with_system = found
    before, answer, behind = answered.rpartition(str(_ANSWER["content"]))
    if not answer:
        before = behind = ""
    return TurnTexts(asked, added_text(bare, asked), before, behind, with_system)


def added_text(without: str, text: str) -> str:
    """What a text has behind that with which both begin, e.g. by a generation prompt."""
    pairs = zip(text, without, strict=False)
    return text[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) :]


def every_turn_texts(tokenizer: Any) -> list[TurnTexts]:
    """`turn_texts` of the chat template, or of each where there are several; none without one."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return []
    state = repr((template, tokenizer.special_tokens_map))
    if _KNOWN.get(tokenizer, ("",))[0] != state:
        names: list[dict[str, Any]] = [{}]
        if isinstance(template, dict):
            names = [{"chat_template": name} for name in template]
        _KNOWN[tokenizer] = state, [turn_texts(tokenizer, args) for args in names]
    texts: list[TurnTexts] = _KNOWN[tokenizer][1]
    return texts


def turn_end_ids(tokenizer: Any, stop_ids: list[int], model_name: str) -> list[int]:
    """The tokens with which the chat template ends an answer, where none of them stops sampling.

    Args:
        tokenizer: A tokenizer of transformers.
        stop_ids: Ids that end a completion by tokenizer, config and generation config.
        model_name: For the message.

    Returns:
        Ids to be added to `stop_ids`.

    Raises:
        UserError: If an answer ends with a text that is not one special token, and no token behind
            it stops sampling.
    """
    found: list[int] = []
    for texts in every_turn_texts(tokenizer):
        if not texts.before and not texts.behind:
            log.warning(
                f"model.policy.name: the chat template of {model_name} shows no answer of the "
                "assistant, so where one ends is not known: sampling stops at "
                f"{_names(tokenizer, stop_ids)} only."
            )
            continue
        ids = tokenizer(texts.behind.strip(), add_special_tokens=False).input_ids
        if not ids or ids[0] in [*stop_ids, *found]:
            continue
        if ids[0] in tokenizer.added_tokens_decoder:
            found.append(int(ids[0]))
        elif not any(token in stop_ids for token in ids):
            raise UserError(
                f"model.policy.name: the chat template of {model_name} ends an answer with "
                f"{texts.behind.strip()[:60]!r}, which is no special token of its tokenizer, and "
                f"sampling stops at {_names(tokenizer, stop_ids)} only: answers would run on into "
                "a turn of the user's. Add it to the tokenizer as a special token, or end turns in "
                "the template with {{ eos_token }}."
            )
    return found


def _names(tokenizer: Any, ids: list[int]) -> str:
    return " or ".join(str(tokenizer.decode([token])) for token in ids)


def conversation_ids(tokenizer: Any, stop_ids: list[int]) -> set[int]:
    """The special tokens that make a conversation, and never belong to what is said in it.

    Args:
        tokenizer: A tokenizer of transformers.
        stop_ids: Ids that end a completion.

    Returns:
        The tokenizer's own (of beginning, end, padding ...), those that end a completion, and all
        special tokens that the chat template writes around plain turns, but for those of thoughts.
    """
    named = {
        getattr(tokenizer, f"{name}_token_id", None)
        for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    }
    found = {int(token) for token in (*named, *stop_ids) if token is not None}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for texts in every_turn_texts(tokenizer):
        written = [texts.asked, texts.with_system, texts.before, texts.behind]
        for ids in tokenizer(written, add_special_tokens=False).input_ids:
            found.update(special.intersection(ids))
    for pair in known_thoughts(tokenizer):
        ids = tokenizer("".join(pair), add_special_tokens=False).input_ids
        found.difference_update(set(ids) - set(stop_ids))
    return found


def known_thoughts(tokenizer: Any) -> list[Markers]:
    """The markers of a model's thoughts, of all of its chat templates."""
    headers = [(each.header, each.before) for each in every_turn_texts(tokenizer)] or [("", "")]
    found = [pair for header in headers for pair in thought_markers(tokenizer, *header)]
    return list(dict.fromkeys(found))


def check_generation_prompt(tokenizer: Any, args: dict[str, Any]) -> None:
    """Refuse a chat template that does not open the assistant's turn, though its answers have one.

    Args:
        tokenizer: A tokenizer of transformers.
        args: Arguments of the chat template.

    Raises:
        UserError: If it ignores `add_generation_prompt`.
    """
    if tokenizer.chat_template is None:
        return
    texts = turn_texts(tokenizer, args)
    lead = texts.lead
    for marker in (part for pair in thought_markers(tokenizer) for part in pair):
        lead = lead.replace(marker, "")
    if texts.asked and not texts.header and lead.strip():
        raise UserError(
            f"prompts: the model's chat template ignores add_generation_prompt: a prompt ends in "
            f"{texts.asked[-30:]!r}, and {texts.lead!r}, which opens an answer, is not written. "
            "Use a model whose template writes it, or mend the template (chat_template in its "
            "tokenizer_config.json)."
        )


# Enough of a prompt's end to hold the assistant header.
_HEADER_TOKENS = 32


class AnswerReader:
    """Makes text of a model's tokens.

    Special tokens that make a conversation (beginning, end, padding, turns) are left out. Others,
    like those around thoughts and tool calls, belong to what is said.

    Args:
        tokenizer: A tokenizer of transformers.
        stop_ids: Ids that end a completion.
    """

    def __init__(self, tokenizer: Any, stop_ids: list[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = list(stop_ids)
        self._hidden = conversation_ids(tokenizer, self.stop_ids)
        self._markers = known_thoughts(tokenizer)

    def text(self, ids: Iterable[int]) -> str:
        """What was said, thoughts included."""
        shown = [token for token in ids if token not in self._hidden]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False))

    def opened(self, prompt_ids: list[int]) -> Markers | None:
        """The markers of the thought that a prompt opens; None where it opens none.

        Args:
            prompt_ids: Ids of the prompt; its last ones are looked at.
        """
        header: list[int] = []
        for token in prompt_ids[-_HEADER_TOKENS:]:
            # What stands before the last token of the conversation is another turn.
            header = [] if token in self._hidden else [*header, token]
        return opens_thought(self.tokenizer.decode(header), self._markers)

    def answer(self, text: str, opened: Markers | None = None) -> str:
        """What was said besides thoughts; empty where a thought never ends.

        Args:
            text: See `text`.
            opened: See `opened`.
        """
        return without_thoughts(text, self._markers, opened)
