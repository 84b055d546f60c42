"""From a raw row to a `Demonstration`: the column map, composed columns, all checks of form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from string import Template, ascii_uppercase
from typing import Any

from sdft_lightning.data.json_rows import ROLES, Rows, messages_from_json
from sdft_lightning.errors import UserError, printable, shown
from sdft_lightning.types import Demonstration, Message, RowNeeds

# What a turn may say besides its content; no text is made of it.
_UNREAD = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Columns:
    """Which column of the file holds what.

    A text with `$` is made of several columns, e.g. `prompt: "$question $choices"`; a list of
    choices becomes lines with letters.

    Args:
        prompt: The question: a text, or chat messages that end with a user turn.
        demonstration: The expert's answer: a text, a list of steps (joined with newlines), or
            chat messages; a whole conversation may start with the prompt's own messages.
        context: Source text for the teacher, or to train on (CPT).
        reference: What the grader compares with.
        id: A unique name of the row; its number in the file where there is none.
    """

    prompt: str = "prompt"
    demonstration: str = "demonstration"
    context: str | None = None
    reference: str | None = None
    id: str | None = None


def parse_rows(
    found: Rows,
    columns: Columns,
    needs: RowNeeds,
    check_reference: Callable[[Any, str], None] | None = None,
    option: str = "data.columns",
) -> list[Demonstration]:
    """Turn raw rows into demonstrations.

    Args:
        found: The raw rows.
        columns: The column map.
        needs: What every row must have.
        check_reference: Called with each row's reference and place where rows are graded.
        option: Which option holds the column map.

    Returns:
        One demonstration a row, in order.

    Raises:
        UserError: Names the file, the row and what is wrong with it.
    """
    _check_columns(found, columns, needs, check_reference is not None, option)
    found = messages_from_json(found, (columns.prompt, columns.demonstration))
    parsed = [
        _parse_row(row, f"{found.name}, {place}", number, columns, needs)
        for number, (row, place) in enumerate(zip(found.rows, found.places, strict=True))
    ]
    _check_unique(parsed, columns)
    if check_reference is not None:
        for row in parsed:
            check_reference(row.reference, row.origin)
    return parsed


def _check_columns(
    found: Rows, columns: Columns, needs: RowNeeds, graded: bool, option: str
) -> None:
    present = _names(found)
    wanted = {"context": columns.context, "id": columns.id}
    if needs.prompt:
        wanted["prompt"] = columns.prompt
    if needs.context and columns.context is None:
        raise UserError(
            f"{option}.context: the method trains on source texts, and no column of "
            f"{found.name} is named as theirs. Its columns are {', '.join(present)}. Map the right "
            f"one with --{option}.context."
        )
    if needs.demonstration:
        wanted["demonstration"] = columns.demonstration
    if graded:
        wanted["reference"] = columns.reference
        if columns.reference is None:
            raise UserError(
                f"{option}.reference: {found.name} is to be graded and no column holds the "
                f"reference. Its columns are {printable(', '.join(present))}."
            )
    for role, name in wanted.items():
        if name is not None and name not in present:
            raise UserError(
                f"{option}.{role}: {found.name} has no column {name!r}. Its columns are "
                f"{printable(', '.join(present))}. Map the right one with --{option}.{role}."
            )


def columns_of_questions(found: Rows, columns: Columns) -> Columns:
    """The column map for rows of which only the questions are read, and their ids if there are any.

    Args:
        found: The raw rows.
        columns: The map of the rows that are trained on.
    """
    named = columns.id if columns.id in _names(found) else None
    return Columns(prompt=columns.prompt, demonstration=columns.demonstration, id=named)


def check_prompts(found: Rows, option: str) -> None:
    """Refuse rows to retain that have no prompts: their columns are not those of the task.

    Args:
        found: The raw rows.
        option: Name of their option.

    Raises:
        UserError: If there is no column `prompt`.
    """
    if "prompt" not in _names(found):
        raise UserError(
            f"{option}: {found.name} has no column 'prompt'. Its columns are "
            f"{printable(', '.join(_names(found)))}. Name the one with the questions so."
        )


def _names(found: Rows) -> list[str]:
    """All columns of the rows."""
    return sorted({name for row in found.rows for name in row}.union(found.columns))


def _parse_row(
    row: dict[str, Any], origin: str, number: int, columns: Columns, needs: RowNeeds
) -> Demonstration:
    prompt = _parse_prompt(row.get(columns.prompt), origin, columns.prompt) if needs.prompt else []
    demonstration = _parse_demonstration(
        row.get(columns.demonstration), prompt, origin, columns.demonstration
    )
    if needs.demonstration and not demonstration:
        raise UserError(
            f"{origin}: the demonstration (column {columns.demonstration!r}) is empty. Fill it or "
            "remove the row; only ReinvokeModule and CPTModule train without demonstrations."
        )
    others = [message["role"] for message in demonstration if message["role"] != "assistant"]
    if needs.target and others:
        raise UserError(
            f"{origin}: the demonstration (column {columns.demonstration!r}) has turns of the role "
            f"{', '.join(sorted(set(others)))}, and the method trains the model to write all of "
            "it. Leave the assistant's turns, move the earlier ones into the prompt, or train with "
            "SDFTModule, whose teacher reads it as a conversation (data.prompts.style: turns)."
        )
    context = None if columns.context is None else row.get(columns.context)
    if context is not None and not isinstance(context, str):
        raise UserError(
            f"{origin}: the context (column {columns.context!r}) must be a text, got "
            f"{type(context).__name__}."
        )
    if needs.context and not (context or "").strip():
        raise UserError(
            f"{origin}: the context (column {columns.context!r}) is empty, and the method trains "
            "on nothing else. Fill it or remove the row."
        )
    row_id = number if columns.id is None else row.get(columns.id)
    if row_id is None or row_id == "":
        raise UserError(
            f"{origin}: the id (column {columns.id!r}) is missing. Fill it, or leave "
            "data.columns.id out to number the rows."
        )
    return Demonstration(
        id=str(row_id),
        prompt=prompt,
        demonstration=demonstration,
        context=context,
        reference=None if columns.reference is None else row.get(columns.reference),
        origin=origin,
    )


def _parse_prompt(value: Any, origin: str, column: str) -> list[Message]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    messages = _parse_messages(value, origin, column)
    if not any(message["role"] == "user" for message in messages):
        raise UserError(
            f"{origin}: the conversation in column {column!r} has no user turn. A prompt must end "
            "with the user's question."
        )
    if messages[-1]["role"] != "user":
        raise UserError(
            f"{origin}: the conversation in column {column!r} ends with the role "
            f"{messages[-1]['role']}. A prompt must end with a user turn; put the answer into the "
            "demonstration column."
        )
    if not messages[-1]["content"].strip():
        raise UserError(f"{origin}: the prompt (column {column!r}) is empty.")
    return messages


def _parse_demonstration(
    value: Any, prompt: list[Message], origin: str, column: str
) -> list[Message]:
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(step, str) for step in value):
        value = "\n".join(value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}] if value.strip() else []
    messages = _parse_messages(value, origin, column)
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if messages and (messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant"):
        raise UserError(
            f"{origin}: the demonstration (column {column!r}) must be assistant turns, or a "
            f"conversation that starts with the prompt, got the roles "
            f"{printable(', '.join(message['role'] for message in messages))}."
        )
    return messages if any(message["content"].strip() for message in messages) else []


def _parse_messages(value: Any, origin: str, column: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(
            f"{origin}: column {column!r} must be a text or a list of messages "
            f"{{role, content}}, got {_describe(value)}."
        )
    messages = []
    for message in value:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise UserError(
                f"{origin}: a message in column {column!r} must have a role "
                f"({', '.join(ROLES)}) and a text as content, got role {shown(role)} and content "
                f"of type {type(content).__name__}."
            )
        unread = [name for name in _UNREAD if message.get(name)]
        if unread:
            raise UserError(
                f"{origin}: a message in column {column!r} has {unread[0]}, which would be lost: "
                "only content is read. Write the call into the content as the model shall write "
                "it, and take the key out."
            )
        messages.append({"role": role, "content": content})
    return messages


def _describe(value: Any) -> str:
    if isinstance(value, list):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a list of {', '.join(kinds)}"
    return "nothing" if value is None else type(value).__name__


def _check_unique(rows: list[Demonstration], columns: Columns) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise UserError(
                f"{row.origin}: the id {shown(row.id)} stands also in {seen[row.id]}. Make the ids "
                f"unique, or leave data.columns.id ({columns.id!r}) out."
            )
        seen[row.id] = row.origin


def wanted_columns(columns: Columns) -> list[str]:
    """The columns of a file that a column map reads, those inside texts with `$` among them."""
    named = [name for name in dataclasses.astuple(columns) if name is not None]
    parts = [part for name in named for part in Template(name).get_identifiers()]
    return list(dict.fromkeys([*named, *parts]))


def compose(found: Rows, columns: Columns) -> Rows:
    """Fill in the columns whose names are texts with `$column` in them.

    Args:
        found: The raw rows.
        columns: The column map. A text of which a column is missing is left alone, so that it is
            told as a column that the file does not have.

    Returns:
        Rows that have a column by the name of each such text.

    Raises:
        UserError: Names the row whose value is no text.
    """
    for text in dict.fromkeys(dataclasses.astuple(columns)):
        if text is None or "$" not in text or text in found.columns:
            continue
        template = Template(text)
        if not template.is_valid():
            raise UserError(
                f"data.columns: a lone $ in {text!r}. Write $name for a column and $$ for a dollar "
                "sign."
            )
        parts = template.get_identifiers()
        if not parts or not set(parts) <= set(found.columns):
            continue
        for row, place in zip(found.rows, found.places, strict=True):
            where = f"{found.name}, {place}"
            values = {part: _text(row.get(part), part, where) for part in parts}
            row[text] = template.substitute(values)
    return found


def _text(value: Any, column: str, where: str) -> str:
    """A value as text; choices as one line each, with their letters."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    labels, texts = list(ascii_uppercase), value
    if isinstance(value, dict) and {"label", "text"} <= value.keys():  # as ARC and SciKnowEval
        labels, texts = value["label"], value["text"]
    is_list = isinstance(texts, list) and all(isinstance(each, str) for each in texts)
    if is_list and 0 < len(texts) <= len(labels):
        pairs = zip(labels, texts, strict=False)
        return "\n".join(f"{label}. {each}" for label, each in pairs)
    raise UserError(
        f"{where}: column {column!r} must be a text, a number, or choices (a list of texts, or "
        f"their text and label), got {type(value).__name__}. Correct it, or leave the row out."
    )
