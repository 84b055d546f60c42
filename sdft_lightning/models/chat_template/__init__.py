"""Chat templates: conversations to text, where turns end, and answers read back from tokens."""

from sdft_lightning.models.chat_template.answers import AnswerReader
from sdft_lightning.models.chat_template.apply import render, render_all, template_error, try_all
from sdft_lightning.models.chat_template.continuation import answer_ids, continuation_ids
from sdft_lightning.models.chat_template.limits import Conversation, Rendering
from sdft_lightning.models.chat_template.shown import Missing, first_missing, shows
from sdft_lightning.models.chat_template.thoughts import (
    Markers,
    opens_thought,
    thought_markers,
    without_thoughts,
)
from sdft_lightning.models.chat_template.turns import (
    TurnTexts,
    added_text,
    check_generation_prompt,
    conversation_ids,
    known_thoughts,
    turn_end_ids,
    turn_texts,
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
