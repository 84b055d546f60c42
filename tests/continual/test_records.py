"""From what a test wrote to a record: which figures of the benchmarks count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.records import measured

METRICS = {
    "stage": "test",
    "test/task/general/accuracy": 0.5,
    "test/capability/general/acc": 0.3,
    "test/capability/ifeval/prompt_level_strict_acc": 0.4,
    "test/capability/ifeval/inst_level_loose_acc": 0.7,
    "test/capability/mmlu_law/acc": 0.9,
    "test/capability/mmlu/acc": 0.6,
    "test/capability/one_of_a_tag/acc": 0.2,
    "test/capability/mean": 0.65,
}


def capabilities(folder: Path, counted: list[dict[str, Any]] | None) -> dict[str, Any]:
    (folder / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
    if counted is not None:
        (folder / "benchmarks.json").write_text(json.dumps(counted))
    found: dict[str, Any] = measured(folder, [], ["general"])["capabilities"]
    return found


def test_the_metric_that_the_plan_names_counts_and_parts_of_groups_do_not(tmp_path: Path) -> None:
    found = capabilities(
        tmp_path,
        [
            {"name": "ifeval", "metric": "inst_level_loose_acc", "leaves": ["ifeval"]},
            {"name": "mmlu", "metric": "acc", "leaves": ["mmlu_law"]},
        ],
    )
    assert found["ifeval"]["metric"] == "inst_level_loose_acc"
    assert found["mmlu"] == {"acc": 0.6, "metric": "acc"}
    assert found["mmlu_law"] == {"acc": 0.9, "in_mean": False}
    assert found["one_of_a_tag"]["in_mean"] is False


def test_of_a_tag_the_members_count_and_without_a_metric_none_is_named(tmp_path: Path) -> None:
    counted = [{"name": "tag", "metric": None, "leaves": ["one_of_a_tag"]}]
    found = capabilities(tmp_path, counted)
    assert found["one_of_a_tag"] == {"acc": 0.2}
    assert found["mmlu"]["in_mean"] is False


def test_benchmark_with_the_name_of_a_held_out_set_stays_beside_it(tmp_path: Path) -> None:
    found = capabilities(tmp_path, None)
    assert found["general"]["accuracy"] == 0.5
    assert found["general (benchmark)"] == {"acc": 0.3}


def test_items_of_benchmarks_stand_under_the_metric_that_counts(tmp_path: Path) -> None:
    lines = [
        ("validation", "capability", "mmlu", "acc", {"law/0": 0.0, "law/1": 0.0}),
        ("test", "capability", "mmlu", "acc", {"law/0": 1.0, "law/1": 0.2}),
        ("test", "capability", "mmlu", "acc_norm", {"law/0": 0.0, "law/1": 0.0}),
        ("test", "capability", "ifeval", "prompt_level_strict_acc", {"0": 0.0, "1": 0.8}),
        ("test", "capability", "ifeval", "inst_level_loose_acc", {"0": 0.5, "1": 1.0, "2": None}),
        ("test", "task", "general", "acc", {"row": 1.0}),  # a held-out set, graded
    ]
    names = ("stage", "kind", "task", "metric", "scores")
    text = "".join(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines)
    (tmp_path / "item_scores.jsonl").write_text(text)
    counted = [{"name": "ifeval", "metric": "inst_level_loose_acc", "leaves": ["ifeval"]}]
    found = capabilities(tmp_path, counted)
    assert found["mmlu"]["items"] == {"law/0": 1.0, "law/1": 0.2}
    assert found["mmlu"]["n"] == 2
    assert "mean_of_items" not in found["mmlu"], "0.6 is the mean of its items"
    assert found["ifeval"]["items"] == {"0": 0.5, "1": 1.0}
    assert found["ifeval"]["mean_of_items"] is False, "0.7 is over instructions, not prompts"
    assert "items" not in found["general (benchmark)"]


@pytest.mark.parametrize("named", [True, False])
def test_suite_tells_what_counts(named: bool, model_folder: Path, tmp_path: Path) -> None:
    from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite, BenchmarkTask

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "A?", "a": "b"}\n')
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}_task\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
            "test_split: test\noutput_type: generate_until\n"
            'doc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
            "generation_kwargs: {until: ['x'], max_gen_toks: 4}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        )
    metric = "exact_match" if named else None
    tasks = [BenchmarkTask(str(tmp_path / "first.yaml"), metric), str(tmp_path / "second.yaml")]
    suite = BenchmarkSuite(Benchmarks(tasks), str(model_folder))
    first = {"name": "first_task", "metric": metric, "leaves": ["first_task"]}
    second = {"name": "second_task", "metric": None, "leaves": ["second_task"]}
    assert suite.counted == ([first] if named else [first, second])
