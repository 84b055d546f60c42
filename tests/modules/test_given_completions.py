"""A file of completions: what is read, and what is refused with the line and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.errors import UserError
from sdft_lightning.modules.completions import (
    CompletionTokens,
    KeptCompletion,
    check_completions,
    read_completions,
)
from sdft_lightning.types import Demonstration

STOP = 2


def read(tmp_path: Path, tokenizer: Any, *lines: Any, longest: int = 8) -> Any:
    path = tmp_path / "given.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return read_completions(str(path), CompletionTokens(tokenizer, [STOP], 272, longest))


def test_text_gets_its_stop_token_unless_truncated_and_ids_stay_as_they_are(
    tmp_path: Path, tokenizer: Any
) -> None:
    text = tokenizer("So.", add_special_tokens=False).input_ids
    found = read(
        tmp_path,
        tokenizer,
        {"id": "a", "completion": "So.", "prompt": "not looked at"},
        {"id": 7, "completion": "So.", "truncated": True},
        {"id": "a", "token_ids": [9, STOP]},
        {"id": "b", "token_ids": [9, 271]},  # 261 and up: of the model, not of the tokenizer
        {"id": "c", "token_ids": [STOP, 9, 9]},
        "",
        {"id": "d", "completion": ""},
    )
    assert found == {
        "a": [KeptCompletion([*text, STOP], False), KeptCompletion([9, STOP], False)],
        "7": [KeptCompletion(text, True)],
        "b": [KeptCompletion([9, 271], True)],
        "c": [KeptCompletion([STOP], False)],  # nothing after the first stop token is a completion
        "d": [KeptCompletion([STOP], False)],
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "a"', ["line 2", "malformed JSON", '"completion": …']),
        ("[1]", ["line 2", "got a list", '"id": …']),
        ({"completion": "So."}, ["line 2", "keys completion", '"id": …']),
        ({"id": "a"}, ["line 2", "keys id"]),
        ({"id": "a", "completion": 3}, ["line 2", "keys id, completion"]),
        ({"id": "a", "token_ids": "9"}, ["line 2", "keys id, token_ids"]),
        ({"id": "a", "completion": "x", "truncated": 1}, ["line 2", "truncated is 1", "true"]),
        (
            {"id": "a", "completion": "x" * 8},
            ["line 2", "9 tokens", "1 to 8", "model.sampling.max_new_tokens", "Raise"],
        ),
        ({"id": "a", "token_ids": []}, ["line 2", "0 tokens"]),
        (
            {"id": "a", "token_ids": [5, 272]},
            ["line 2", "5 to 272", "has 0 to 271", "another model"],
        ),
    ],
)
def test_wrong_line_is_refused_with_its_place_and_the_form(
    line: Any, words: list[str], tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, tokenizer, {"id": "x", "completion": "So."}, line)
    assert all(word in str(error.value) for word in ["given.jsonl", *words])


def test_missing_file_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"model\.completions: .*absent\.jsonl.*leave it out"):
        read_completions("absent.jsonl", CompletionTokens(tokenizer, [STOP], 272, 8))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_row_with_too_few_or_too_many_completions_is_named(count: int) -> None:
    rows = [
        Demonstration(name, [], [], None, None, f"rows.jsonl, line {number}")
        for number, name in enumerate("ab", start=1)
    ]
    one = KeptCompletion([STOP], False)
    given = {"a": [one, one], "b": [one] * count, "other": [one]}
    with pytest.raises(UserError) as error:
        check_completions(given, rows, 2, "given.jsonl")
    message = str(error.value)
    assert message.startswith(f"rows.jsonl, line 2: given.jsonl has {count} completions")
    assert "'b'" in message
    assert "completions_per_prompt is 2" in message
    check_completions({**given, "b": [one, one]}, rows, 2, "given.jsonl")


def test_text_may_hold_characters_that_look_like_line_ends(tmp_path: Path, tokenizer: Any) -> None:
    line = json.dumps({"id": "a", "completion": "a\u2028b\u0085c"}, ensure_ascii=False)
    found = read(tmp_path, tokenizer, line, longest=20)
    assert tokenizer.decode(found["a"][0].token_ids[:-1]) == "a\u2028b\u0085c"
