"""Token ids of a text that goes on from another."""

from __future__ import annotations

from typing import Any

from sdft_lightning.models.chat_template.apply import render
from sdft_lightning.models.chat_template.turns import every_turn_texts


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
