"""Three small tasks of the harness with files of their own, and the harness's own model class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUESTIONS = [
    {"question": f"Which is {word}?", "choices": [word, "no", f"the other {word}", ""], "answer": 0}
    for word in ("red", "a long blue one", "green ", "x")
]
for _row in QUESTIONS:
    _row["choices"][3] = "maybe so"

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: choice.jsonl}}
output_type: multiple_choice
validation_split: validation
fewshot_split: validation
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {validation: texts.jsonl}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {data_files: {validation: choice.jsonl}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: [STOP], do_sample: false, max_gen_toks: 24}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """choice.yaml, rolling.yaml and generation.yaml with their data."""

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")

    write("choice.jsonl", QUESTIONS)
    texts = ["A short text.", "word " * 150, "x", "the end of it all, " * 40]
    write("texts.jsonl", [{"text": text} for text in texts])
    for name, body in (("choice", CHOICE), ("rolling", ROLLING), ("generation", GENERATION)):
        (tmp_path / f"{name}.yaml").write_text(body, encoding="utf-8")
    return tmp_path


@pytest.fixture
def harness_results(model: Any, tokenizer: Any) -> Callable[..., Any]:
    """Evaluate the tiny model with the harness's own HFLM; results with samples."""

    def evaluate_tasks(loaded: dict[str, Any], **options: Any) -> Any:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=512)
        return evaluate(lm=theirs, task_dict=loaded, bootstrap_iters=1000, **options)

    return evaluate_tasks


@pytest.fixture
def task_file(task_folder: Path) -> Path:
    """choice.yaml, a task of four questions."""
    return task_folder / "choice.yaml"


@pytest.fixture
def benchmark_args(task_file: Path) -> Callable[..., list[str]]:
    """Arguments of the command line that measure `task_file`, with other settings."""

    def arguments(**settings: Any) -> list[str]:
        task = {"name": str(task_file), "metric": "acc"}
        options = {"tasks": [task], "batch_size": 4, **settings}
        return ["--data.benchmarks", json.dumps(options)]

    return arguments
