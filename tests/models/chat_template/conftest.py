"""Tokenizers with the chat templates of well-known models, and of the kind of SentencePiece."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.types import Demonstration

TEMPLATES = Path(__file__).parent / "templates"


@pytest.fixture
def with_template(make_tokenizer: Callable[..., Any]) -> Callable[[str], Any]:
    """A tiny tokenizer with one of the templates; its tokens stand for the model's own."""

    def make(name: str) -> Any:
        return make_tokenizer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))

    return make


@pytest.fixture
def make_row() -> Callable[..., Demonstration]:
    """A row with a question (or several turns), a demonstration and a context."""

    def make(
        prompt: str | list[tuple[str, str]] = "What is 1 + 1?",
        demonstration: str | list[tuple[str, str]] = "It is 2.",
        context: str | None = "Sums.",
    ) -> Demonstration:
        turns = [("user", prompt)] if isinstance(prompt, str) else prompt
        if isinstance(demonstration, str):
            demonstration = [("assistant", demonstration)]
        asked, shown = (
            [{"role": role, "content": content} for role, content in part]
            for part in (turns, demonstration)
        )
        return Demonstration("7", asked, shown, context, None, "a.jsonl, row 7")

    return make


@pytest.fixture
def sentencepiece_like() -> Callable[..., Any]:
    """A tokenizer of characters that writes a blank as ▁, and one before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(chat_template: str, prepend: str = "first") -> Any:
        special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
        letters = [chr(code) for code in range(33, 127)] + ["▁", "\n", "\n\n", "▁I", "▁It"]
        vocabulary = {token: place for place, token in enumerate([*special, *letters])}
        merges = [("\n", "\n"), ("▁", "I"), ("▁I", "t")]
        raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
        if prepend == "legacy":  # as Llama 2
            raw.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:
            raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
        raw.decoder = decoders.Metaspace(prepend_scheme="first")
        raw.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make
