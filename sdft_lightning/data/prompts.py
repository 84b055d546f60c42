"""Student and teacher prompts rendered from a demonstration.

A style is a list of chat turns with `$prompt`, `$demonstration` and `$context` in them. They stand
in the place of the last user turn; system turns and earlier turns stay for both roles. The text of
`paper` is that of the paper's public code, newline by newline (METHOD §2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from string import Template
from typing import Any, Literal, get_args

from sdft_lightning.errors import UserError, check_choice, shown
from sdft_lightning.models.chat_template import (
    Conversation,
    added_text,
    check_generation_prompt,
    first_missing,
    known_thoughts,
    opens_thought,
    render_all,
    shows,
    without_thoughts,
)
from sdft_lightning.types import Demonstration, Message, RowNeeds

StyleName = Literal["paper", "turns", "context", "template"]
ControlTokens = Literal["tell", "refuse", "escape"]

# Enough of a prompt's end to hold the assistant header.
_HEADER_CHARACTERS = 80

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
        control_tokens: What happens to rows with a token of the chat template in their text, as
            <|im_start|>: tell (the model reads the token), refuse, or escape (a blank behind its
            first character makes it a text).
    """

    style: StyleName = "paper"
    template: str | list[dict[str, str]] | None = None
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    student_template_args: dict[str, Any] = field(default_factory=dict)
    teacher_template_args: dict[str, Any] = field(default_factory=dict)
    control_tokens: ControlTokens = "tell"

    def __post_init__(self) -> None:
        """Refuse an unknown style, and a template that is missing, unused or without a hint."""
        check_choice("prompts.style", self.style, get_args(StyleName))
        check_choice("prompts.control_tokens", self.control_tokens, get_args(ControlTokens))
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

    @cached_property
    def student_args(self) -> dict[str, Any]:
        """Arguments of the chat template for the student; one object, as every row asks for it."""
        return {**self.chat_template_args, **self.student_template_args}

    @cached_property
    def teacher_args(self) -> dict[str, Any]:
        """Arguments of the chat template for the teacher."""
        return {**self.chat_template_args, **self.teacher_template_args}

    @property
    def needs_context(self) -> bool:
        """Whether rows must have a context."""
        return any("context" in _placeholders(turn["content"]) for turn in self.turns)

    @property
    def needs_demonstration(self) -> bool:
        """Whether rows must have a demonstration."""
        return any("demonstration" in _placeholders(turn["content"]) for turn in self.turns)


@lru_cache(maxsize=256)  # asked for every row
def _placeholders(text: str) -> list[str]:
    return Template(text).get_identifiers()


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


def student_conversation(row: Demonstration, style: PromptStyle) -> Conversation:
    """What the student is asked: the bare question."""
    return Conversation(row.prompt, style.student_args, where=row.origin)


def teacher_conversation(row: Demonstration, style: PromptStyle) -> Conversation:
    """What the teacher is asked: the question with its demonstration."""
    return Conversation(teacher_messages(row, style), style.teacher_args, where=row.origin)


def answered_conversation(row: Demonstration, style: PromptStyle) -> Conversation:
    """The student's conversation with the demonstration as its answer."""
    asked = student_conversation(row, style)
    answer: Message = {"role": "assistant", "content": demonstration_text(row)}
    return asked._replace(messages=[*row.prompt, answer], generation_prompt=False)


def render_student(tokenizer: Any, row: Demonstration, style: PromptStyle) -> str:
    """The student prompt as text."""
    return render_all(tokenizer, [student_conversation(row, style)])[0]


def render_teacher(tokenizer: Any, row: Demonstration, style: PromptStyle) -> str:
    """The teacher prompt as text."""
    return render_all(tokenizer, [teacher_conversation(row, style)])[0]


def render_target(tokenizer: Any, row: Demonstration, style: PromptStyle) -> str:
    """The demonstration as the completion of the student prompt, see `target_text`."""
    conversations = [student_conversation(row, style), answered_conversation(row, style)]
    prompt, whole = render_all(tokenizer, conversations)
    return target_text(tokenizer, demonstration_text(row), prompt, whole)


def target_text(tokenizer: Any, text: str, prompt: str, whole: str) -> str:
    """An answer as the completion of a prompt, with what ends a turn.

    Prompt and target together are the conversation as the chat template renders it. Where that does
    not begin with the prompt, or lacks a part of the answer (thinking models), the answer stands as
    it is. If the prompt has opened a thought, an answer with thoughts goes on with it, and one
    without closes it first.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The answer.
        prompt: The rendered prompt.
        whole: The rendered conversation with the answer; empty if there is none.

    Returns:
        The text after the prompt.
    """
    if tokenizer.chat_template is None:
        return f" {text}{tokenizer.eos_token}"
    if whole.startswith(prompt) and shows(whole, text):
        return whole[len(prompt) :]
    markers = known_thoughts(tokenizer)
    text = text.strip()
    said = without_thoughts(text, markers)
    before, found, end = whole.rpartition(said) if said else ("", "", "")
    if not found:
        end = str(tokenizer.eos_token)
    opened = opens_thought(prompt[-_HEADER_CHARACTERS:], markers)
    if opened is None:
        blank = before[len(before.rstrip()) :] if said == text else ""
        return ("" if prompt.endswith(blank) else blank) + text + end
    newline = "\n" if prompt.endswith("\n") else ""
    if opened.closing not in text:
        return f"{newline}{opened.closing}\n\n{text}{end}"
    thought = text.removeprefix(opened.opening)
    return (thought.lstrip() if newline else thought) + end


def check_shown(row: Demonstration, conversation: Conversation, rendered: str, role: str) -> None:
    """Refuse a row of which the chat template leaves a text out.

    Args:
        row: The row.
        conversation: What is shown of it.
        rendered: The rendered conversation.
        role: student or teacher, for the message.

    Raises:
        UserError: Names the row, the text and the remedy.
    """
    missing = first_missing(conversation.messages, rendered)
    if missing is None:
        return
    name = str(missing.message["role"])
    of = {"system": "the system turn", "user": "the question"}.get(name, f"a turn of the {name}")
    shown = missing.text in demonstration_text(row)
    if shown and missing.message not in row.prompt:
        of = "the demonstration"
    elif row.context and missing.text in row.context:
        of = "the context"
    remedy = (
        "Show it in another way (data.prompts.style), give the template arguments "
        "(data.prompts.chat_template_args, e.g. enable_thinking), or change the row"
    )
    if name == "system":
        remedy = "The model knows no such turn: write it into the question, or take it out"
    elif missing.is_thought and of == "the demonstration":
        remedy = (
            "The styles paper and template show it in the user's turn (data.prompts.style); or "
            "give the template an argument that keeps thoughts (data.prompts.chat_template_args), "
            "or take them out of the demonstration"
        )
    raise UserError(
        f"{row.origin}: the model's chat template leaves a part of {of} out of the {role}'s "
        f"prompt: {missing.text[:60]!r}. {remedy}."
    )


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
    asked = [student_conversation(row, style), teacher_conversation(row, style)]
    bare = [conversation._replace(generation_prompt=False) for conversation in asked]
    texts = render_all(tokenizer, [*asked, *bare])
    student, teacher = (
        added_text(without, text) for text, without in zip(texts[:2], texts[2:], strict=True)
    )
    if student != teacher:
        raise UserError(
            f"prompts: the student's prompt ends in {shown(student)}, the teacher's in "
            f"{shown(teacher)}. Both must open the answer alike: give both roles the same template "
            "arguments (e.g. enable_thinking)."
        )
    return student


def check_headers(
    tokenizer: Any, rows: Sequence[Demonstration], style: PromptStyle, needs: RowNeeds
) -> None:
    """Check, on the first rows, that answers are opened, and alike for both roles.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: The rows of a set.
        style: The style with its template arguments.
        needs: What the method does with the rows.

    Raises:
        UserError: If the template opens no answer, or another one for the teacher.
    """
    if needs.prompt and rows:
        check_generation_prompt(tokenizer, student_conversation(rows[0], style).args)
    taught = next((row for row in rows if row.demonstration), None)
    if taught is not None and needs.teacher_prompt:
        check_same_header(tokenizer, taught, style)


def without_hint(style: PromptStyle) -> PromptStyle:
    """The same template arguments with the style `turns`, for rows that are never taught from."""
    return dataclasses.replace(style, style="turns", template=None)
