"""Student and teacher prompts rendered from a demonstration.

A style is a list of chat turns with `$prompt`, `$demonstration` and `$context` in them. They stand
in the place of the last user turn; system turns and earlier turns stay for both roles. The text of
`paper` is that of the paper's public code, newline by newline (METHOD §2).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import takewhile
from string import Template
from typing import Any, Literal, get_args

from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.foreign_text import printable, shown
from sdft_lightning.types import Demonstration, Message

StyleName = Literal["paper", "turns", "context", "template"]

_PAPER = """
$prompt

This is an example for a response to the question:
$demonstration

Now answer with a response of your own, including the thinking process.
"""

STYLES: dict[str, list[dict[str, str]]] = {
    "paper": [{"role": "user", "content": _PAPER}],
    "turns": [
        {"role": "user", "content": "$prompt"},
        {"role": "assistant", "content": "$demonstration"},
        {"role": "user", "content": "$prompt"},
    ],
    "context": [
        {"role": "user", "content": "$context\n\n$prompt"},
        {"role": "assistant", "content": "$demonstration"},
        {"role": "user", "content": "$context\n\n$prompt"},
    ],
}

# Documented format for a tokenizer without a chat template.
_PLAIN_ROLES = {"system": "", "user": "Question: ", "assistant": "Answer: "}
_PLAIN_HEADER = "Answer:"


@dataclass(frozen=True)
class PromptStyle:
    """How the teacher is shown the demonstration.

    Args:
        style: paper (one turn, METHOD §2), turns (the demonstration as an earlier chat turn; what
            small models need), context (the same, each question after its source text),
            or template (your own).
        template: For style template: the text of the last user turn, or a list of turns
            `{role, content}`, with $prompt, $demonstration and $context; only there.
        chat_template_args: Arguments of the chat template for both roles, e.g.
            `{enable_thinking: false}`.
        student_template_args: Further ones for the student only.
        teacher_template_args: Further ones for the teacher only.
    """

    style: StyleName = "paper"
    template: str | list[dict[str, str]] | None = None
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    student_template_args: dict[str, Any] = field(default_factory=dict)
    teacher_template_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an unknown style, and a template that is missing, unused or without a hint."""
        check_choice("prompts.style", self.style, get_args(StyleName))
        if (self.style == "template") != (self.template is not None):
            raise UserError(
                f"prompts.template: it belongs to the style template, got style {self.style} and "
                f"template {shown(self.template)}. Give both or neither."
            )
        if isinstance(self.template, str):
            # The text stands for the one user turn.
            turns = [{"role": "user", "content": self.template}]
            object.__setattr__(self, "template", turns)
        self._check_turns()

    def _check_turns(self) -> None:
        turns = self.turns
        if not turns or any(set(turn) != {"role", "content"} for turn in turns):
            raise UserError("prompts.template: each turn needs `role` and `content`, nothing else.")
        for turn in turns:
            content, role = turn["content"], turn["role"]
            if not isinstance(content, str) or role not in ("system", "user", "assistant"):
                raise UserError(
                    "prompts.template: each turn needs a role (system, user, assistant) and a text "
                    f"as content, got {shown(turn)}."
                )
            if any(match["invalid"] is not None for match in Template.pattern.finditer(content)):
                raise UserError(
                    f"prompts.template: a lone $ in {shown(content)}. Write $$ for a dollar sign."
                )
        if turns[-1]["role"] != "user":
            raise UserError("prompts.template: the last turn must have the role user.")
        names = {name for turn in turns for name in _placeholders(turn["content"])}
        unknown = names - {"prompt", "demonstration", "context"}
        if unknown or "prompt" not in names or not names & {"demonstration", "context"}:
            raise UserError(
                "prompts.template: it needs $prompt and at least one of $demonstration and "
                f"$context (write $$ for a dollar sign), got {sorted(names) or 'none'}."
            )

    @property
    def turns(self) -> list[dict[str, str]]:
        """The turns that replace the last user turn."""
        if self.template is not None:
            assert not isinstance(self.template, str)
            return self.template
        return STYLES[self.style]

    @property
    def needs_context(self) -> bool:
        """Whether rows must have a context."""
        return any("context" in _placeholders(turn["content"]) for turn in self.turns)

    @property
    def needs_demonstration(self) -> bool:
        """Whether rows must have a demonstration."""
        return any("demonstration" in _placeholders(turn["content"]) for turn in self.turns)


def _placeholders(text: str) -> list[str]:
    try:
        return Template(text).get_identifiers()
    except AttributeError:  # Python 3.10
        found = Template.pattern.finditer(text)
        return [m["named"] or m["braced"] for m in found if m["named"] or m["braced"]]


def demonstration_text(row: Demonstration) -> str:
    """The demonstration as one text: its messages joined with newlines."""
    return "\n".join(str(message["content"]) for message in row.demonstration)


def teacher_messages(row: Demonstration, style: PromptStyle) -> list[Message]:
    """Chat messages of the teacher prompt.

    Args:
        row: The row.
        style: How the demonstration is shown.

    Returns:
        The row's own earlier turns, then the style's.

    Raises:
        UserError: If the style needs a context that the row does not have.
    """
    if style.needs_context and not row.context:
        raise UserError(
            f"{row.origin}: the style {style.style} shows the teacher a context, and this row has "
            "none. Map a column with data.columns.context, or choose the style turns or paper."
        )
    values = {
        "prompt": row.prompt[-1]["content"],
        "demonstration": demonstration_text(row),
        "context": row.context or "",
    }
    messages = list(row.prompt[:-1])
    for turn in style.turns:
        if turn["content"] == "$demonstration" and turn["role"] == "assistant":
            messages.extend(row.demonstration)  # several messages stay several turns
        else:
            content = Template(turn["content"]).substitute(values)
            messages.append({"role": turn["role"], "content": content})
    return messages


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
    """
    return _apply_template(tokenizer, messages, template_args, generation_prompt=True)


def _apply_template(
    tokenizer: Any, messages: list[Message], args: dict[str, Any], generation_prompt: bool
) -> str:
    if tokenizer.chat_template is None:
        paragraphs = [
            _PLAIN_ROLES.get(message["role"], "") + str(message["content"]) for message in messages
        ]
        header = [_PLAIN_HEADER] if generation_prompt else []
        return (tokenizer.bos_token or "") + "\n\n".join(paragraphs + header)
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **args
        )
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise UserError(
            f"prompts: the model's chat template refuses a conversation of the roles "
            f"{printable(roles)}: {printable(str(error))} It ends with "
            f"{shown(str(messages[-1]['content']), 60)}. Change its turns, or the "
            "style (data.prompts.style)."
        ) from error
    return text


def render_student(tokenizer: Any, row: Demonstration, style: PromptStyle) -> str:
    """The student prompt: the bare question."""
    args = {**style.chat_template_args, **style.student_template_args}
    return render(tokenizer, row.prompt, args)


def render_teacher(tokenizer: Any, row: Demonstration, style: PromptStyle) -> str:
    """The teacher prompt: the question with its demonstration."""
    args = {**style.chat_template_args, **style.teacher_template_args}
    return render(tokenizer, teacher_messages(row, style), args)


def render_target(tokenizer: Any, row: Demonstration, style: PromptStyle) -> str:
    """The demonstration as the completion of the student prompt, with what ends a turn.

    Where the chat template writes an assistant turn otherwise than its header and the text
    (thinking models), the plain text and the end-of-sequence token stand in.

    Args:
        tokenizer: A tokenizer of transformers.
        row: The row.
        style: The template arguments of the student are taken from it.

    Returns:
        The text after the student prompt.
    """
    args = {**style.chat_template_args, **style.student_template_args}
    prompt = render(tokenizer, row.prompt, args)
    text = demonstration_text(row)
    answered = [*row.prompt, {"role": "assistant", "content": text}]
    whole = _apply_template(tokenizer, answered, args, generation_prompt=False)
    if tokenizer.chat_template is not None and whole.startswith(prompt + text.strip()[:1]):
        return whole[len(prompt) :]
    lead = " " if tokenizer.chat_template is None else ""
    return lead + text + str(tokenizer.eos_token)


def assistant_header(tokenizer: Any, messages: list[Message], args: dict[str, Any]) -> str:
    """What the chat template adds to open the assistant's turn."""
    with_header = _apply_template(tokenizer, messages, args, generation_prompt=True)
    without = _apply_template(tokenizer, messages, args, generation_prompt=False)
    pairs = zip(with_header, without, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return with_header[same:]


def check_same_header(tokenizer: Any, row: Demonstration, style: PromptStyle) -> str:
    """Check that both roles are asked to go on from the same assistant header.

    Args:
        tokenizer: A tokenizer of transformers.
        row: Any row of the data.
        style: The style with its template arguments.

    Returns:
        The header.

    Raises:
        UserError: If the headers differ, so that student and teacher would predict different
            things at the first token.
    """
    args = style.chat_template_args
    student = assistant_header(tokenizer, row.prompt, {**args, **style.student_template_args})
    teacher = assistant_header(
        tokenizer, teacher_messages(row, style), {**args, **style.teacher_template_args}
    )
    if student != teacher:
        raise UserError(
            f"prompts: the student's prompt ends in {shown(student)}, the teacher's in "
            f"{shown(teacher)}. "
            "Both must open the answer alike: give both roles the same template arguments "
            "(e.g. enable_thinking)."
        )
    return student


def without_hint(style: PromptStyle) -> PromptStyle:
    """The same template arguments with the style `turns`, for rows that are never taught from."""
    return dataclasses.replace(style, style="turns", template=None)
