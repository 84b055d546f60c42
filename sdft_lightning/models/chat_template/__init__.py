"""Chat templates: conversations to text, where turns end, and answers read back from tokens."""

from sdft_lightning.models.chat_template.apply import (
    Conversation,
    Rendering,
    render,
    render_all,
    template_error,
    try_all,
)
from sdft_lightning.models.chat_template.shown import (
    Missing,
    answer_ids,
    continuation_ids,
    first_missing,
    shows,
)
from sdft_lightning.models.chat_template.turns import (
    AnswerReader,
    Markers,
    TurnTexts,
    added_text,
    check_generation_prompt,
    conversation_ids,
    known_thoughts,
    opens_thought,
    thought_markers,
    turn_end_ids,
    turn_texts,
    without_thoughts,
)

__all__ = [
    "AnswerReader",
    "Conversation",
    "Markers",
    "Missing",
    "Rendering",
    "TurnTexts",
    "added_text",
    "answer_ids",
    "check_generation_prompt",
    "continuation_ids",
    "conversation_ids",
    "first_missing",
    "known_thoughts",
    "opens_thought",
    "render",
    "render_all",
    "shows",
    "template_error",
    "thought_markers",
    "try_all",
    "turn_end_ids",
    "turn_texts",
    "without_thoughts",
]
