"""The task YAMLs in configs/benchmarks, on real items where they are at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite, BenchmarkTask
from sdft_lightning.data.benchmarks.sandbox import run_program
from sdft_lightning.data.benchmarks.task_functions import join, program
from sdft_lightning.data.benchmarks.task_yaml import harness_yaml, read_task_yaml
from sdft_lightning.errors import UserError
from sdft_lightning.types import ContinuationScore, RequestResponse, ScoringBatch

CONFIGS = Path(__file__).parents[3] / "configs" / "benchmarks"
NEEDS_CODE = {"humaneval", "humaneval_hub"}
ON_THE_HUB = {"humaneval_hub"}
MANY_PROGRAMS = {"humaneval_pass_at_k"}  # see test_code.py


@pytest.fixture
def roomy_folder(make_model_folder: Callable[..., Path]) -> Path:
    """A tiny model that takes the answers that HumanEval and IFEval may have."""
    return make_model_folder(max_position_embeddings=4096)


def build(name: str, data_dir: Path | None, model_folder: Path, **settings: Any) -> BenchmarkSuite:
    options = Benchmarks(
        [BenchmarkTask(str(CONFIGS / f"{name}.yaml"), **settings)],
        data_dir=None if data_dir is None else str(data_dir),
        allow_code_execution=name in NEEDS_CODE,
        limit=3,
    )
    return BenchmarkSuite(options, str(model_folder))


@pytest.mark.parametrize(
    "name",
    sorted(p.stem for p in CONFIGS.glob("*.yaml") if p.stem not in ON_THE_HUB | MANY_PROGRAMS),
)
def test_every_task_file_loads_asks_and_measures(
    name: str, shared_data: Path, roomy_folder: Path
) -> None:
    suite = build(name, shared_data / "benchmarks", roomy_folder)
    score = ContinuationScore(-1.0, False)
    batches = [suite.dataset[[i]] for i in range(len(suite.dataset))]
    responses = [
        RequestResponse(request, 0, score, None if isinstance(batch, ScoringBatch) else "an answer")
        for batch in batches
        for request in batch.requests
    ]
    measured = suite.metrics(responses)
    assert measured
    assert all(value.samples == 3 for value in measured.values())


@pytest.mark.parametrize("name", ["hellaswag", "winogrande", "truthfulqa_mc2", "ifeval", "gsm8k"])
def test_a_local_task_asks_what_the_harness_asks(name: str, shared_data: Path) -> None:
    config = read_task_yaml(CONFIGS / f"{name}.yaml", str(shared_data / "benchmarks"))
    path = harness_yaml(name)
    assert path is not None
    from lm_eval.tasks._yaml_loader import load_yaml

    theirs = load_yaml(path)
    for key in ("doc_to_text", "doc_to_choice", "metric_list", "filter_list", "output_type"):
        assert config.get(key) == theirs.get(key) or callable(config.get(key)), key
    assert config["dataset_path"] == "json"


def test_the_demo_s_general_questions_are_a_task(roomy_folder: Path) -> None:
    suite = build("front_desk_general", None, roomy_folder, apply_chat_template=True)
    assert len(suite.answered) == 3
    score = ContinuationScore(0.0, False)
    texts = ["The capital of France is Paris.", "I do not know.", "I do not know."]
    responses = [RequestResponse(i, 0, score, text) for i, text in enumerate(texts)]
    assert suite.metrics(responses)["front_desk_general/acc"].value == pytest.approx(1 / 3)


def test_code_is_not_run_unasked(shared_data: Path, roomy_folder: Path) -> None:
    options = Benchmarks(
        [str(CONFIGS / "humaneval.yaml")], data_dir=str(shared_data / "benchmarks")
    )
    with pytest.raises(UserError, match="allow_code_execution"):
        BenchmarkSuite(options, str(roomy_folder))


def test_humaneval_counts_answers_that_pass(shared_data: Path, roomy_folder: Path) -> None:
    file = shared_data / "benchmarks" / "humaneval" / "validation.jsonl"
    items = [json.loads(line) for line in file.read_text().splitlines()[:3]]
    try:
        gold = [run_program(program(d, d["prompt"] + d["canonical_solution"])) for d in items]
    except UserError as error:
        pytest.skip(str(error))
    assert all(outcome.passed for outcome in gold)
    suite = build("humaneval", shared_data / "benchmarks", roomy_folder)
    score = ContinuationScore(0.0, False)
    texts = [items[0]["canonical_solution"], "    return None\n", "    while True: pass\n"]
    responses = [RequestResponse(i, 0, score, text) for i, text in enumerate(texts)]
    measured = suite.metrics(responses)["humaneval/pass@1,create_test"]
    assert measured.value == pytest.approx(1 / 3)


def test_articles_begin_at_their_titles() -> None:
    lines = ["", " = First = \n", "", " a = b \n", "", " = = Section = = \n", "", " = Second = \n"]
    assert join(lines) == ["".join(lines[:7]), " = Second = \n"]
    assert len(join([" = One = \n", " = Two = \n"])) == 1, "a title follows an empty line"
