"""The scores of single items: what the harness has of them, and what it has not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite
from sdft_lightning.data.benchmarks.suite import _with_items
from sdft_lightning.modules.capability import CapabilityScores
from sdft_lightning.types import Items, Measurement

LISTS = """
task: tiny_lists
dataset_path: json
dataset_kwargs: {data_files: {validation: choice.jsonl}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: [STOP], do_sample: false, max_gen_toks: 4}
process_results: !function own.parts
metric_list:
- {metric: parts, aggregation: !function own.share, higher_is_better: true}
- {metric: f1, aggregation: f1, higher_is_better: true}
"""
OWN = """
def parts(doc, results):
    first = "red" in doc["question"]
    return {"parts": [first, True, False], "f1": (int(first), 1)}


def share(items):
    found = [each for parts in items for each in parts]
    return sum(found) / len(found)
"""


def measured(
    suite: BenchmarkSuite, model: Any, tokenizer: Any
) -> tuple[dict[str, Measurement], list[str]]:
    module = SimpleNamespace(
        gather_student=lambda: model, tokenizer=tokenizer, stop_ids=[tokenizer.eos_token_id]
    )
    scores = CapabilityScores()
    for index in range(len(suite.dataset)):
        scores.respond(module, suite.dataset[[index]])
    return suite.metrics(scores.responses), suite.item_names()


@pytest.fixture
def suite_of(task_folder: Path, model_folder: Path) -> Callable[..., BenchmarkSuite]:
    """The suite of some of the tiny tasks."""

    def build(*names: str, **options: Any) -> BenchmarkSuite:
        files = [str(task_folder / f"{name}.yaml") for name in names]
        return BenchmarkSuite(Benchmarks([*files], batch_size=5, **options), str(model_folder))

    return build


def test_items_have_the_harness_s_scores_and_their_mean_is_the_metric(
    suite_of: Callable[..., BenchmarkSuite],
    model: Any,
    tokenizer: Any,
    harness_results: Callable[..., Any],
) -> None:
    suite = suite_of("choice", "generation")
    ours, names = measured(suite, model, tokenizer)
    theirs = harness_results(suite.tasks[0].loaded)["samples"]["tiny_choice"]
    for metric in ("acc", "acc_norm"):
        found = ours[f"tiny_choice/{metric}"]
        assert found.items is not None
        assert found.items.scores == {str(each["doc_id"]): each[metric] for each in theirs}
        assert sum(found.items.scores.values()) / 4 == found.value
    wanted = ["tiny_choice/acc", "tiny_choice/acc_norm", "tiny_generation/exact_match"]
    assert names == wanted
    assert sorted(n for n, x in ours.items() if x.items is not None) == wanted


def test_items_of_a_perplexity_are_log_likelihoods_with_the_words_that_they_are_of(
    suite_of: Callable[..., BenchmarkSuite], model: Any, tokenizer: Any
) -> None:
    ours, names = measured(suite_of("rolling"), model, tokenizer)
    assert names == ["tiny_rolling/word_perplexity"]
    found = ours["tiny_rolling/word_perplexity"]
    assert found.items is not None
    assert found.items.weights == {"0": 3.0, "1": 151.0, "2": 1.0, "3": 201.0}
    total = sum(found.items.scores.values()) / sum(found.items.weights.values())
    assert math.exp(-total) == pytest.approx(found.value)


def test_a_list_is_a_score_for_each_part_and_a_pair_is_no_score(
    suite_of: Callable[..., BenchmarkSuite], task_folder: Path, model: Any, tokenizer: Any
) -> None:
    (task_folder / "lists.yaml").write_text(LISTS, encoding="utf-8")
    (task_folder / "own.py").write_text(OWN, encoding="utf-8")
    ours, names = measured(suite_of("lists", allow_task_code=True), model, tokenizer)
    assert names == ["tiny_lists/parts"]
    assert ours["tiny_lists/f1"].items is None
    found = ours["tiny_lists/parts"].items
    assert found is not None
    assert found.scores == pytest.approx({"0": 2 / 3, "1": 1 / 3, "2": 1 / 3, "3": 1 / 3})


def test_other_questions_are_other_content(
    suite_of: Callable[..., BenchmarkSuite], task_folder: Path, model: Any, tokenizer: Any
) -> None:
    def content() -> str:
        found = measured(suite_of("choice"), model, tokenizer)[0]["tiny_choice/acc"].items
        assert found is not None
        return found.content

    before = content()
    assert content() == before
    rows = (task_folder / "choice.jsonl").read_text(encoding="utf-8").splitlines()
    changed = {**json.loads(rows[1]), "answer": 1}
    text = "\n".join([rows[0], json.dumps(changed), *rows[2:]]) + "\n"
    (task_folder / "choice.jsonl").write_text(text, encoding="utf-8")
    assert content() != before


def test_items_of_a_group_s_parts_stand_with_the_group() -> None:
    def sample(score: float) -> dict[str, Any]:
        return {
            "filter": "none",
            "metrics": ["acc", "alone"],
            "doc_id": 0,
            "doc_hash": "d",
            "prompt_hash": "p",
            "acc": score,
            "alone": score,
        }

    leaf = SimpleNamespace(aggregation=dict)
    task: Any = SimpleNamespace(name="mmlu", leaves={"law": leaf, "art": leaf})
    names = ["mmlu/acc", "law/acc", "art/acc", "law/alone", "art/alone"]
    found = _with_items(
        {name: Measurement(0.5, None, 2) for name in names},
        {"law": [sample(1.0)], "art": [sample(0.0)]},
        task,
    )
    assert found["mmlu/acc"].items is not None
    assert found["mmlu/acc"].items.scores == {"law/0": 1.0, "art/0": 0.0}
    assert found["law/acc"].items is found["art/acc"].items is None
    alone = found["law/alone"].items
    assert isinstance(alone, Items)
    assert alone.scores == {"0": 1.0}
