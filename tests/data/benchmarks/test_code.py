"""Answers to HumanEval's items: run side by side, counted in order, pass@k from many of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite
from sdft_lightning.data.benchmarks.sandbox import run_program
from sdft_lightning.data.benchmarks.task_functions import passes, results, run_answers
from sdft_lightning.errors import UserError
from sdft_lightning.types import ContinuationScore, RequestResponse

PASS_AT_K = Path(__file__).parents[3] / "configs" / "benchmarks" / "humaneval_pass_at_k.yaml"
ITEM = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"}
RIGHT, WRONG = "    return 1\n", "    return 2\n"


@pytest.fixture(autouse=True)
def sandbox() -> None:
    """Skip where programs cannot be limited."""
    try:
        run_program("pass")
    except UserError as error:
        pytest.skip(str(error))


def test_slow_programs_take_less_than_their_sum_and_keep_their_order() -> None:
    programs = [f"import time; time.sleep(1.5); assert {i} % 2" for i in range(4)]
    start = time.perf_counter()
    assert passes(programs, at_once=4) == [False, True, False, True]
    assert time.perf_counter() - start < 5.0  # one after the other: above 6


def test_programs_side_by_side_do_not_take_each_other_s_threads() -> None:
    # Five programs of two processes each: more than the four that one may have alone.
    program = (
        "import threading, time\n"
        "thread = threading.Thread(target=time.sleep, args=(1,))\n"
        "thread.start()\n"
        "thread.join()"
    )
    assert passes([program] * 5, at_once=5) == [True] * 5


def test_each_answer_is_run_with_the_tests_of_its_own_item() -> None:
    other = {**ITEM, "test": "def check(f):\n    assert f() == 2"}
    answers = [[RIGHT, WRONG], [WRONG], [RIGHT]]
    assert run_answers(answers, [ITEM, other, other]) == [[True, False], [True], [False]]


def test_whole_functions_from_a_filter_of_one_s_own_are_run_too() -> None:
    functions = [ITEM["prompt"] + answer for answer in (RIGHT, WRONG)]
    assert results(ITEM, [functions]) == {"pass@1": 0.5, "pass@2": 1.0}
    assert results(ITEM, [[True, False]]) == {"pass@1": 0.5, "pass@2": 1.0}


def test_pass_at_k_counts_several_sampled_answers_to_an_item(
    shared_data: Path, tmp_path: Path, make_model_folder: object
) -> None:
    file = tmp_path / "four.yaml"
    file.write_text(f"include: {PASS_AT_K}\nrepeats: 4\n")
    options = Benchmarks(
        [str(file)],
        data_dir=str(shared_data / "benchmarks"),
        allow_code_execution=True,
        limit=2,
    )
    folder = make_model_folder(max_position_embeddings=4096)  # type: ignore[operator]
    suite = BenchmarkSuite(options, str(folder))
    batch = suite.dataset[[0]]
    assert batch.settings.temperature == 0.8
    assert sorted(zip(batch.requests, batch.copies, strict=True)) == [
        (request, copy) for request in range(2) for copy in range(4)
    ]
    data = shared_data / "benchmarks" / "humaneval" / "validation.jsonl"
    gold = json.loads(data.read_text().splitlines()[0])["canonical_solution"]
    texts = {(0, 1): gold, (0, 3): gold}  # two of four right, and none of the second item's
    score = ContinuationScore(0.0, False)
    measured = suite.metrics(
        RequestResponse(request, copy, score, texts.get((request, copy), "    return None\n"))
        for request in range(2)
        for copy in range(4)
    )
    found = {name: value.value for name, value in measured.items()}
    # 1 - C(2, k) / C(4, k) for the first item, 0 for the second.
    assert found == {
        "humaneval_pass_at_k/pass@1,create_test": pytest.approx(1 / 4),
        "humaneval_pass_at_k/pass@2,create_test": pytest.approx(5 / 12),
        "humaneval_pass_at_k/pass@4,create_test": pytest.approx(1 / 2),
    }


def test_the_task_file_names_every_k_that_its_answers_give() -> None:
    # The harness stops where a task returns a metric that its file does not name.
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(PASS_AT_K)
    named = [each["metric"] for each in config["metric_list"]]
    assert named == list(results(ITEM, [[True] * config["repeats"]]))
    assert named[-1] == "pass@128"
