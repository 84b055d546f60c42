"""Feeds mutated JSON Lines to the loader: only documented errors may come out.

python scripts/fuzz_rows.py --count 100000
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.data.rows import Columns, parse_rows
from sdft_lightning.data.sources import read_rows
from sdft_lightning.data.tokenize import Lengths, Tokenizer, tokenize_rows
from sdft_lightning.errors import UserError
from sdft_lightning.graders import GRADERS, check_reference, get_grader
from sdft_lightning.types import RowNeeds

CALLS = [{"Action": "open", "Action_Input": '{"door": "yellow"}'}]
GOOD: list[dict[str, Any]] = [
    {"prompt": "Q?", "demonstration": "It is 48.", "reference": "48", "context": "T", "id": 1},
    {"prompt": "Ä ü 🙂", "demonstration": ["a", "b"], "reference": ["x", "y"], "context": "T"},
    {
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "$x Q?"}],
        "demonstration": [{"role": "assistant", "content": "A"}],
        "reference": "B. water",
        "context": "$demonstration",
        "id": "r",
    },
    {
        "prompt": "Open",
        "demonstration": "Action: open\nAction Input: {}",
        "reference": CALLS,
        "context": "T",
    },
]
VALUES: list[Any] = [
    None, True, 0, -1, 1e308, 10**30, "", " ", "\u2028", "\x00", "<|im_end|>", "${", "$prompt", [],
    {}, [[]], [""], [None], {"role": "user"}, [{"role": "user", "content": None}],
    [{"role": ["user"], "content": "x"}], [{"role": "assistant", "content": "x"}], "\u0130" * 40,
    [{"Action": 1, "Action_Input": []}],
]  # fmt: skip
PIECES = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00",
    b"\xff", b"\xed\xa0\x80", b"\n", b"\r", b"\xef\xbb\xbf", b"NaN", b"Infinity", b"1e999", b"null",
    b"9" * 5000, b"[" * 3000, b'{"a":' * 2000, b"\xe2\x80\xa8", b"//", b"'",
]  # fmt: skip
STYLES = ("paper", "turns", "context")


def mutate_value(value: Any, chance: random.Random) -> Any:
    """Replace, drop or double one node of a JSON value."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        action = chance.random()
        if action < 0.15:
            return {name: each for name, each in value.items() if name != key}
        if action < 0.25:
            return {**value, str(chance.choice(VALUES)): value[key]}
        return {**value, key: mutate_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        changed = [*value]
        changed[place] = mutate_value(value[place], chance)
        return changed if chance.random() < 0.8 else [*changed, changed[place]]
    return chance.choice(VALUES)


def mutate_bytes(line: bytes, chance: random.Random) -> bytes:
    """Cut, double, overwrite or insert at one place."""
    place = chance.randrange(len(line) + 1)
    end = min(len(line), place + chance.randrange(1, 9))
    piece = chance.choice([chance.choice(PIECES), line[place:end] * 2, b"", chance.randbytes(2)])
    return line[:place] + piece + line[chance.choice([place, end]) :]


def broken_line(chance: random.Random) -> bytes:
    """A good line with up to two mutations of its value, and up to two of its bytes."""
    row: Any = chance.choice(GOOD)
    for _ in range(chance.choice([0, 0, 0, 1, 2])):
        row = mutate_value(row, chance)
    line = json.dumps(row, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(chance.choice([0, 0, 0, 0, 1, 2])):
        line = mutate_bytes(line, chance)
    return line


def load(path: Path, tokenizer: Any, chance: random.Random) -> None:
    """What `fit` does with a file before training, and then each grader with any answer.

    Raises:
        UserError: If the file is refused.
    """
    grader = chance.choice([None, "contains", *GRADERS])
    optional = {
        name: name if chance.random() < 0.5 else None for name in ("context", "reference", "id")
    }
    if grader is not None:
        optional["reference"] = "reference"
    check = None if grader is None else partial(check_reference, grader)
    found = read_rows(str(path), "data.train")
    needs = RowNeeds(demonstration=chance.random() < 0.8)
    rows = parse_rows(found, Columns(**optional), needs, check)
    style = PromptStyle(chance.choice(STYLES))  # type: ignore[arg-type]
    lengths = Lengths(200, 300, 100, chance.choice(["error", "skip", "truncate"]))
    for tokens in tokenize_rows(rows, Tokenizer(tokenizer, style, lengths, [2])).rows:
        assert tokens.prompt_ids
        assert len(tokens.prompt_ids) <= 200
        if grader is not None:
            answer = chance.choice(["48", "", "B", str(chance.choice(VALUES)), "Action: open"])
            assert 0 <= get_grader(grader)(answer, tokens.row.reference) <= 1


def fuzz(count: int, seed: int, tokenizer: Any) -> Counter[str]:
    """Load `count` broken files of one to three lines.

    Args:
        count: How many.
        seed: Of the mutations.
        tokenizer: A tokenizer of transformers.

    Returns:
        How many were accepted and how many refused.

    Raises:
        AssertionError: With the file's bytes, if anything but a UserError came out.
    """
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            path = Path(folder) / chance.choice(["rows.jsonl", "rows.jsonl", "rows.json"])
            data = b"\n".join(broken_line(chance) for _ in range(chance.choice([1, 1, 1, 2])))
            if path.suffix == ".json" and chance.random() < 0.5:
                data = b"[" + data.replace(b"\n", b",") + b"]"
            path.write_bytes(data)
            try:
                load(path, tokenizer, chance)
                outcomes["accepted"] += 1
            except UserError:
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"file {number}: {error!r} for {data[:2000]!r}") from error
    return outcomes


def tiny_tokenizer() -> Callable[[], Any]:
    """`build_tokenizer` of the tests."""
    path = Path(__file__).parents[1] / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build: Callable[[], Any] = module.build_tokenizer
    return build


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    outcomes = fuzz(options.count, options.seed, tiny_tokenizer()())
    print(
        f"{options.count} broken files: {outcomes['refused']} refused with a documented error, "
        f"{outcomes['accepted']} accepted, none with any other error "
        f"({time.monotonic() - start:.0f} s)"
    )


if __name__ == "__main__":
    main()
