"""Conversations as text by a chat template, in a process with limits; failures are sentences.

A template comes with a model that somebody published, and is a program: it may loop for hours or
build a text of gigabytes. The process is a copy of this one (`fork`), which starts at once and
holds the tokenizer. It ends by itself when nothing is asked of it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdft_lightning.errors import UserError
from sdft_lightning.types import Message

SECONDS = 5.0  # of processor time, for one conversation
_TOGETHER = 64  # conversations that are rendered and sent in one; each alone takes twice the time
_SECONDS_TOGETHER = 1.0
MEMORY = 512 << 20  # bytes, beyond what the process holds when it starts
LONGEST = 8 << 20  # characters
_IDLE_SECONDS = 3.0
# Without `fork`, and where the address space cannot be limited, templates are rendered in place.
_LIMITS = sys.platform == "linux"


class Conversation(NamedTuple):
    """Chat messages and how they are rendered.

    Attributes:
        messages: Chat messages.
        args: Arguments of the chat template.
        generation_prompt: Whether the header of the assistant's next turn is written behind them.
        where: `file, row n`, for messages to the user.
    """

    messages: list[Message]
    args: dict[str, Any]
    generation_prompt: bool = True
    where: str = "prompts"


class Rendering(NamedTuple):
    """What became of a conversation.

    Attributes:
        text: The rendered text; None where the template failed.
        reason: Why it failed.
        refused: Whether the template failed by Jinja's own error, as where it refuses a role.
    """

    text: str | None
    reason: str = ""
    refused: bool = False


def render_limited(tokenizer: Any, conversations: Sequence[Conversation]) -> list[Rendering]:
    """The texts of `tokenizer.apply_chat_template`, up to the first that exceeds a limit.

    Args:
        tokenizer: A tokenizer of transformers with a chat template.
        conversations: What to render.

    Returns:
        One result each; those behind one that exceeds a limit are left out.
    """
    if not _LIMITS or multiprocessing.current_process().daemon:
        return [_render(tokenizer, each) for each in conversations]
    with _LOCK:
        return _renderer_of(tokenizer).render(conversations)


def _render(tokenizer: Any, conversation: Conversation) -> Rendering:
    from jinja2 import TemplateError

    messages, args, generation_prompt, _ = conversation
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **args
        )
    except TemplateError as error:
        return Rendering(None, _said(error), True)
    except MemoryError:
        return Rendering(None, f"it asks for more than {MEMORY >> 20} MiB of memory")
    except Exception as error:  # a template is a program, and may raise anything
        return Rendering(None, _said(error))
    return _checked(text)


def _render_together(tokenizer: Any, conversations: Sequence[Conversation]) -> list[Rendering]:
    """What `_render` makes of each, in one call for all that have the same arguments."""
    found: list[Rendering] = [Rendering(None)] * len(conversations)
    left = list(range(len(conversations)))
    while left:
        _, args, generation_prompt, _ = conversations[left[0]]
        alike = [i for i in left if conversations[i][1:3] == (args, generation_prompt)]
        left = [i for i in left if i not in alike]
        try:
            texts = tokenizer.apply_chat_template(
                [conversations[i].messages for i in alike],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **args,
            )
        except Exception:  # of one of them, which alone says what it is
            texts = None
        for number, place in enumerate(alike):
            if texts is None:
                found[place] = _render(tokenizer, conversations[place])
            else:
                found[place] = _checked(texts[number])
    return found


def _checked(text: Any) -> Rendering:
    if not isinstance(text, str):
        return Rendering(None, f"it gives a {type(text).__name__} and no text")
    if len(text) > LONGEST:
        return Rendering(None, f"its text has {len(text)} characters, allowed are {LONGEST}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Rendering(None, "its text has a lone surrogate, half of a character")
    return Rendering(text)


def _said(error: Exception) -> str:
    """Kind and text of an error in one line; the templates' own refusals have no kind."""
    text = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    return text if kind == "TemplateError" and text else f"{kind}: {text}".rstrip(": ")


class _Renderer:
    """The other process, and what it knows."""

    def __init__(self, tokenizer: Any) -> None:
        self.owner = os.getpid()
        self.tokenizer = tokenizer
        self.known = _state(tokenizer)
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._ours, tokenizer), daemon=True
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of threads; the copy runs Jinja alone.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def fits(self, tokenizer: Any) -> bool:
        """Whether it is this process's, still there, and knows the tokenizer as it is."""
        return (
            self.owner == os.getpid()
            and self.tokenizer is tokenizer
            and self.known == _state(tokenizer)
            and self._process.is_alive()
        )

    def render(
        self, conversations: Sequence[Conversation], together: bool = True
    ) -> list[Rendering]:
        """What becomes of the conversations, up to the first that ends the process.

        Args:
            conversations: What to render.
            together: Whether many are rendered at once; where that exceeds a limit, one by one.
        """
        found: list[Rendering] = []
        try:
            # Plain tuples and texts are quicker to send than named ones.
            self._ours.send(([tuple(each) for each in conversations], together))
            while len(found) < len(conversations):
                received = self._ours.recv()
                found += [Rendering(each) if isinstance(each, str) else each for each in received]
        except (EOFError, ConnectionError):
            self._process.join()
            left = conversations[len(found) :]
            if self._process.exitcode == 0:  # it left just now, as nothing had been asked
                return _renderer_of(self.tokenizer).render(conversations, together)
            if together:
                return found + _renderer_of(self.tokenizer).render(left, together=False)
            found.append(Rendering(None, self._cause(self._process.exitcode)))
        return found

    def _cause(self, code: int | None) -> str:
        if code == -signal.SIGPROF:
            return f"it takes more than {SECONDS:g} s of processor time"
        return f"its process died (exit code {code}), most often of memory"

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        if self.owner == os.getpid():
            self._process.kill()
            self._process.join()


_LOCK = threading.RLock()
_KEPT: list[_Renderer] = []


def _renderer_of(tokenizer: Any) -> _Renderer:
    if not _KEPT or not _KEPT[0].fits(tokenizer):
        for renderer in _KEPT:
            renderer.close()
        _KEPT[:] = [_Renderer(tokenizer)]
    return _KEPT[0]


def _state(tokenizer: Any) -> tuple[Any, Any]:
    return tokenizer.chat_template, dict(getattr(tokenizer, "special_tokens_map", {}))


def _serve(connection: Any, parents: Any, tokenizer: Any) -> None:
    """Render what is asked, until nothing is."""
    import resource

    parents.close()  # so that the end of the other process is seen
    gc.freeze()  # nothing that was copied is finalized here
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while connection.poll(_IDLE_SECONDS):
        try:
            conversations, together = connection.recv()
        except EOFError:
            return
        size, seconds = (_TOGETHER, _SECONDS_TOGETHER) if together else (1, SECONDS)
        wanted = [Conversation(*each) for each in conversations]
        for start in range(0, len(wanted), size):
            # SIGPROF ends the process, also inside of one long operation of Python's.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            found = _render_together(tokenizer, wanted[start : start + size])
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send([each if each.text is None else each.text for each in found])


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
