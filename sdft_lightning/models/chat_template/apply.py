"""Conversations as text by a tokenizer's chat template; every failure is a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdft_lightning.errors import UserError
from sdft_lightning.models.chat_template.limits import Conversation, Rendering, render_limited
from sdft_lightning.types import Message

# Documented format for a tokenizer without a chat template.
_PLAIN_ROLES = {"system": "", "user": "Question: ", "assistant": "Answer: "}
_PLAIN_HEADER = "Answer:"
_REMEDY = (
    "Change its turns, the style (data.prompts.style) or the template's arguments "
    "(data.prompts.chat_template_args)."
)


def render(tokenizer: Any, messages: list[Message], template_args: dict[str, Any]) -> str:
    """Messages as text, ending in the header of the assistant's next turn.

    Without a chat template a plain format is used: the system text, then
    `Question: …` / `Answer: …` paragraphs, ending in `Answer:`.

    Args:
        tokenizer: A tokenizer of transformers.
        messages: Chat messages.
        template_args: Arguments of the chat template.

    Returns:
        The text, with all special tokens of the template in it.

    Raises:
        UserError: If the chat template fails.
    """
    return render_all(tokenizer, [Conversation(messages, template_args)])[0]


def render_all(tokenizer: Any, conversations: Sequence[Conversation]) -> list[str]:
    """Conversations as text, as `render` writes one.

    Raises:
        UserError: Names the first conversation of which the chat template makes nothing.
    """
    texts: list[str] = []
    for conversation, found in zip(conversations, try_all(tokenizer, conversations), strict=False):
        if found.text is None:
            raise template_error(conversation, found)
        texts.append(found.text)
    return texts


def try_all(tokenizer: Any, conversations: Sequence[Conversation]) -> list[Rendering]:
    """Conversations as text, or why not; those behind one that exceeds a limit are left out.

    Raises:
        UserError: If the tokenizer has several chat templates and none is chosen.
    """
    if tokenizer.chat_template is None:
        return [Rendering(_plain(tokenizer, each)) for each in conversations]
    for args in {id(each.args): each.args for each in conversations}.values():
        _check_one_template(tokenizer, args)
    found = render_limited(tokenizer, conversations)
    return [
        Rendering(None, "it makes nothing of them")
        if each.text is not None and not each.text
        else each
        for each in found
    ]


def template_error(conversation: Conversation, found: Rendering) -> UserError:
    """The sentence on a conversation of which the chat template makes nothing."""
    messages = conversation.messages
    roles = ", ".join(str(message["role"]) for message in messages)
    verb = "refuses" if found.refused else "fails on"
    return UserError(
        f"{conversation.where}: the model's chat template {verb} a conversation of the roles "
        f"{roles}: {found.reason} (the last turn: {str(messages[-1]['content'])[:60]!r}). {_REMEDY}"
    )


def _plain(tokenizer: Any, conversation: Conversation) -> str:
    paragraphs = [
        _PLAIN_ROLES.get(message["role"], "") + str(message["content"])
        for message in conversation.messages
    ]
    header = [_PLAIN_HEADER] if conversation.generation_prompt else []
    return (tokenizer.bos_token or "") + "\n\n".join(paragraphs + header)


def _check_one_template(tokenizer: Any, args: dict[str, Any]) -> None:
    """Refuse several templates of which none is chosen, or one that there is not."""
    named = tokenizer.chat_template
    if not isinstance(named, dict):
        return
    chosen = args.get("chat_template")
    if chosen in named or (chosen is None and "default" in named) or "{" in str(chosen):
        return
    names = ", ".join(sorted(named))
    raise UserError(
        f"prompts: the model has several chat templates ({names}), and "
        f"{'none is the default' if chosen is None else f'{chosen!r} is none of them'}. Choose one "
        f"with --data.prompts.chat_template_args='{{chat_template: {next(iter(named))}}}'."
    )
