"""The tasks that the package ships: found by name, without the harness's index or a network."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite, BenchmarkTask, tasks
from sdft_lightning.data.sources import example_path, example_tasks
from sdft_lightning.errors import UserError
from sdft_lightning.types import ContinuationScore, RequestResponse

NAMES = ["kept_instructions", "kept_questions", "kept_text"]


@pytest.fixture
def suite_of(
    make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., BenchmarkSuite]:
    """Build the suite of a shipped task, with no way to the harness's index or to a server."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a shipped task needs neither an index nor a network")

    folder = make_model_folder(max_position_embeddings=4096)
    monkeypatch.setattr(tasks, "task_manager", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)

    def build(name: str, **options: Any) -> BenchmarkSuite:
        task = BenchmarkTask(name, apply_chat_template=name != "kept_text")
        return BenchmarkSuite(Benchmarks([task], **options), str(folder))

    return build


def rows(name: str) -> list[dict[str, Any]]:
    text = example_path(f"example:kept/{name}.jsonl", "test").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_shipped_tasks_have_the_names_of_their_files() -> None:
    assert list(example_tasks()) == NAMES
    for name, path in example_tasks().items():
        assert f"\ntask: {name}\n" in path.read_text(encoding="utf-8")


def test_an_unknown_name_is_answered_with_the_shipped_ones(
    make_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = SimpleNamespace(task_index={}, all_tasks=["ifeval"])
    monkeypatch.setattr(tasks, "task_manager", lambda: index)
    told = r"Near: kept_instructions.*this package's own \(kept_instructions, kept_questions, kept"
    with pytest.raises(UserError, match=told):
        BenchmarkSuite(Benchmarks(["kept_instruction"]), str(make_model_folder()))


def test_instructions_are_scored_strictly_and_loosely(
    suite_of: Callable[..., BenchmarkSuite],
) -> None:
    suite = suite_of("kept_instructions")
    count = len(rows("instructions"))
    assert len(suite.answered) == count
    answers = json.loads((Path(__file__).parent / "instruction_answers.json").read_text("utf-8"))
    texts = [answers.get(row["id"], "") for row in rows("instructions")]
    score = ContinuationScore(0.0, False)
    measured = suite.metrics(RequestResponse(i, 0, score, text) for i, text in enumerate(texts))
    right = measured["kept_instructions/prompt_level_strict_acc"]
    assert right.value == pytest.approx(len(answers) / count)
    assert right.samples == count
    assert right.stderr is not None
    instructions = [len(row["checks"]) for row in rows("instructions")]
    followed = sum(len(row["checks"]) for row in rows("instructions") if row["id"] in answers)
    found = measured["kept_instructions/inst_level_strict_acc"].value
    assert found == pytest.approx(followed / sum(instructions))
    loosely = measured["kept_instructions/prompt_level_loose_acc"].value
    assert loosely == pytest.approx(right.value)
    assert measured["kept_instructions/answer_words"].value > 0
    assert 0.9 < measured["kept_instructions/answer_distinct_2"].value < 1.0


def test_questions_are_right_where_an_accepted_answer_stands(
    suite_of: Callable[..., BenchmarkSuite],
) -> None:
    suite = suite_of("kept_questions", limit=3)
    score = ContinuationScore(0.0, False)
    texts = [rows("questions")[0]["demonstration"], "I do not know.", ""]
    measured = suite.metrics(RequestResponse(i, 0, score, text) for i, text in enumerate(texts))
    assert measured["kept_questions/acc"].value == pytest.approx(1 / 3)


def test_word_perplexity_is_over_the_words_of_all_texts(
    suite_of: Callable[..., BenchmarkSuite],
) -> None:
    suite = suite_of("kept_text")
    words = sum(len(row["text"].split()) for row in rows("text"))
    batches = [suite.dataset[[i]] for i in range(len(suite.dataset))]
    requests = [request for batch in batches for request in batch.requests]
    score = ContinuationScore(-10.0, False)
    measured = suite.metrics(RequestResponse(request, 0, score, None) for request in requests)
    expected = math.exp(10.0 * len(requests) / words)
    assert measured["kept_text/word_perplexity"].value == pytest.approx(expected)
    assert measured["kept_text/word_perplexity"].samples == len(rows("text"))
