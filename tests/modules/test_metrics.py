"""What is counted over batches and ranks: the same on two processes as on one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdft_lightning.graders import wilson_interval
from sdft_lightning.graders.metrics import NamedMetrics, TaskAccuracy, WeightedMean
from sdft_lightning.modules.window import StepValues

CPU = torch.device("cpu")

TWO_RANKS = """
import json, sys
import torch
from torch import distributed
from sdft_lightning.graders.metrics import NamedMetrics, TaskAccuracy, WeightedMean
from sdft_lightning.modules.window import StepValues

rank, folder, scores, values = int(sys.argv[1]), sys.argv[2], *map(json.loads, sys.argv[3:])
distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
accuracies, means, step = NamedMetrics(TaskAccuracy), NamedMetrics(WeightedMean), StepValues()
cpu = torch.device("cpu")
for _ in range(2):  # the second time from none, as in the next validation
    for name, mine in scores[rank]:
        accuracies.of(name, cpu).update(mine)
    for value, weight in values[rank]:
        means.of("drift", cpu).update(torch.tensor(value), weight)
        step.update("loss", torch.tensor(value), torch.tensor(float(weight)))
        step.update_largest("most", torch.tensor(value))
        row = torch.tensor([[weight, 5, weight, 5]])
        step.update_bigrams("distinct", row, torch.ones_like(row).bool())
    of_step = {k: float(v) for k, v in step.take().items()}
    found = accuracies.compute(cpu), {k: float(v) for k, v in means.compute(cpu).items()}, of_step
    print(json.dumps(found))
"""


def test_accuracy_is_the_mean_score_with_its_wilson_interval() -> None:
    counted = TaskAccuracy()
    counted.update([1.0, 0.0, 0.5])
    counted.update([1.0])
    assert counted.compute() == (0.625, *wilson_interval(2.5, 4))


def test_answers_without_a_verdict_are_left_out() -> None:
    counted = TaskAccuracy()
    counted.update([math.nan])
    assert counted.compute() is None
    counted.update([1.0, math.nan, 0.0])
    found = counted.compute()
    assert found is not None
    assert found.value == 0.5


def test_metric_can_be_updated_after_a_reset_in_inference_mode() -> None:
    counted, mean = TaskAccuracy(), WeightedMean()
    with torch.inference_mode():  # as Trainer.validate
        counted.update([0.0])
        mean.update(torch.tensor(9.0), 1.0)
        counted.reset()
        mean.reset()
    counted.update([1.0])
    mean.update(torch.tensor(2.0), 3.0)
    mean.update(torch.tensor(6.0), 1.0)
    found = counted.compute()
    assert found is not None
    assert found.value == 1.0
    assert mean.compute() == 3.0


def test_one_nan_makes_a_weighted_mean_nan() -> None:
    mean = WeightedMean()
    for value in (1.0, math.nan):
        mean.update(torch.tensor(value), 1.0)
    assert mean.compute().isnan()


def test_accuracy_counts_thousands_also_where_bfloat16_is_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's bf16-true does in a step
    try:
        counted = TaskAccuracy()
        for _ in range(1000):
            counted.update([1.0, 0.0, 0.0])
        found = counted.compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found is not None
    assert found.value == pytest.approx(1 / 3, abs=1e-6)
    assert found.high - found.low < 0.04


def test_ranks_with_unlike_tasks_add_up_the_same_names_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sdft_lightning.graders import metrics

    def gather(of_ranks: list[list[str]], mine: list[str]) -> None:
        assert mine == ["b", "a"]
        of_ranks[:] = [["c", "a"], mine]  # this rank is the second

    two_ranks = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "all_gather_object": gather,
    }
    monkeypatch.setattr(metrics, "distributed", SimpleNamespace(**two_ranks))
    counted = NamedMetrics(TaskAccuracy)
    for name in ("b", "a"):
        counted.of(name, CPU).update([1.0, 0.0])
    found = counted.compute(CPU)
    # Each task is collectives of its own; a rank that leaves c out would wait in another than
    # the rest.
    assert list(found) == ["c", "a", "b"]
    assert counted.metrics == {}  # the next validation may have other names
    assert found["c"] is None
    assert found["a"].value == 0.5


@pytest.mark.slow
def test_two_processes_come_to_what_one_does_to_the_bit(tmp_path: Path) -> None:
    # Thirds, so that an order of adding up, or a dtype, would show; "b" is on one rank only.
    scores: list[Any] = [
        [["a", [1 / 3, 1.0, 0.0]], ["a", [2 / 3]]],
        [["b", [1 / 3, 0.0]], ["a", [1 / 3, 1 / 3]]],
    ]
    values: list[Any] = [[[0.1, 3], [0.7, 2]], [[1 / 3, 1]]]
    command = [sys.executable, "-c", TWO_RANKS]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path), json.dumps(scores), json.dumps(values)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    accuracies, mean, step = NamedMetrics(TaskAccuracy), WeightedMean(), StepValues()
    for name, mine in scores[0] + scores[1]:
        accuracies.of(name, CPU).update(mine)
    for value, weight in values[0] + values[1]:
        mean.update(torch.tensor(value), weight)
        step.update("loss", torch.tensor(value), torch.tensor(float(weight)))
        step.update_largest("most", torch.tensor(value))
        row = torch.tensor([[weight, 5, weight, 5]])
        step.update_bigrams("distinct", row, torch.ones_like(row).bool())
    expected = [
        {name: list(found) for name, found in accuracies.compute(CPU).items()},
        {"drift": float(mean.compute())},
        {name: float(value) for name, value in step.take().items()},
    ]
    assert expected[2]["distinct"] == pytest.approx(6 / 9)  # (3, 5), (5, 3) and so on, two each
    for output in outputs:
        assert [json.loads(line) for line in output.splitlines()] == [expected, expected]
