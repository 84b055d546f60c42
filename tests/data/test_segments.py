"""Parts that several texts share are tokenized once, and the ids are those of the whole texts."""

from __future__ import annotations

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdft_lightning.data.tokens import SegmentEncoder, encode_texts
from sdft_lightning.models.tokenization import load_tokenizer

WORDS = ["harbour", " tide", "\n", "é", "  ", "x9", "<|im_start|>", "<|im_end|>", "<|im_", "user"]


def mixed(count: int) -> list[str]:
    draw = random.Random(0)
    texts = ["".join(draw.choices(WORDS, k=draw.randrange(12))) for _ in range(count)]
    return [*texts, "", "<|im_end|>", "plain words only"]


def whole(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


class Counted:
    """A tokenizer that keeps the texts that reach its backend in parts."""

    truncation = padding = None

    def __init__(self, tokenizer: Any) -> None:
        self._inner = tokenizer
        self.parts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(*args, **kwargs)

    @property
    def backend_tokenizer(self) -> Any:
        return self

    def encode_batch_fast(self, texts: list[str], **kwargs: Any) -> Any:
        self.parts += texts
        return self._inner.backend_tokenizer.encode_batch_fast(texts, **kwargs)


@pytest.mark.embedded
def test_ids_are_those_of_the_whole_texts() -> None:
    tokenizer = load_tokenizer("embedded")
    texts = mixed(300)
    assert encode_texts(tokenizer, texts) == whole(tokenizer, texts)
    assert encode_texts(tokenizer, texts[7:9]) == whole(tokenizer, texts[7:9])
    assert encode_texts(tokenizer, []) == []


@pytest.mark.embedded
def test_what_another_call_has_cut_or_padded_changes_nothing() -> None:
    tokenizer = load_tokenizer("embedded")
    texts = mixed(20)
    expected = whole(tokenizer, texts)
    assert encode_texts(tokenizer, texts) == expected
    tokenizer(texts, truncation=True, max_length=2, padding="max_length")
    assert encode_texts(tokenizer, texts) == expected


@pytest.mark.embedded
def test_a_shared_part_is_tokenized_once() -> None:
    counted = Counted(load_tokenizer("embedded"))
    encode = SegmentEncoder(counted)
    question = "<|im_start|>user\nWhen does the ferry leave?<|im_end|>\n<|im_start|>assistant\n"
    texts = [question, f"{question}At seven.<|im_end|>\n"]
    assert encode(counted, texts) == whole(counted, texts)
    counted.parts.clear()
    assert encode(counted, texts) == whole(counted, texts)
    assert counted.parts.count("user\nWhen does the ferry leave?") == 1
    assert len(counted.parts) == len(set(counted.parts))


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_tokenizer_that_treats_the_first_word_apart_is_given_whole_texts(scheme: str) -> None:
    vocabulary = {"<unk>": 0, "<end>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "▁b": 6}
    raw = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>")
    )
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>")
    texts = ["a<end>b", "b<end>a<end>", "a b"]
    expected = whole(tokenizer, texts)
    assert (len(set(map(tuple, whole(tokenizer, ["a<end>b", "<end>b"]))))) == 2
    counted = Counted(tokenizer)
    encode = SegmentEncoder(counted)
    assert encode(counted, texts) == expected
    counted.parts.clear()
    assert encode(counted, texts) == expected
    assert bool(counted.parts) == (scheme == "always")


def test_threads_agree_on_a_tokenizer_that_needs_whole_texts() -> None:
    raw = Tokenizer(
        models.BPE(vocab={"<unk>": 0, "<end>": 1, "▁": 2, "a": 3}, merges=[], unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>")
    texts = ["a<end>a"] * 64
    for _ in range(20):
        encode = SegmentEncoder(tokenizer)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: encode(tokenizer, texts), range(8)))  # noqa: B023
        assert found == [whole(tokenizer, texts)] * 8


def test_a_tokenizer_that_nobody_has_any_more_is_let_go() -> None:
    raw = Tokenizer(models.BPE(vocab={"a": 0, "<end>": 1}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    encode_texts(tokenizer, ["a<end>", "a"])
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


def test_tokenizer_without_special_tokens_is_given_whole_texts() -> None:
    raw = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert encode_texts(tokenizer, ["ab", "ba"]) == [[2], [1, 0]]
