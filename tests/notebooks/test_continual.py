"""The third notebook: two skills in sequence, and the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a kernel imports everything anew, on a busy machine slowly
]
Execute = Callable[..., Any]

# Accuracies on four questions of (bakery, library): the tiny model has none that tell anything.
KNOWN = """
from sdft_lightning.graders import wilson_interval

trained = [dict(record) for record in records]
KNOWN = {0: (0.0, 0.25), 1: (0.75, 0.5), 2: (0.5, 1.0)}
for record in records:
    for (name, measured), accuracy in zip(record["tasks"].items(), KNOWN[record["stage"]]):
        items = {key: float(i < 4 * accuracy) for i, key in enumerate(measured["items"])}
        low, high = wilson_interval(4 * accuracy, 4)
        record["tasks"][name] = dict(accuracy=accuracy, low=low, high=high, n=4, items=items)
results.write_text("".join(json.dumps(record) + "\\n" for record in records))
"""


def test_continual_notebook_trains_all_and_reads_the_forgetting_matrix(execute: Execute) -> None:
    keep = ["trained", "matrices", "scores", "by_hand", "drift", "report", "results"]
    left = execute("03_continual.ipynb", keep, after=("continual", KNOWN))
    (work,) = left.folders
    assert work in Path(left["results"]).parents
    assert (work / "report" / "index.html").is_file()

    runs = ["sdft/seed42/1_bakery", "sdft/seed42/2_library"]
    runs += ["sft/seed42/1_bakery", "sft/seed42/2_library"]
    assert [(r["run"], r["status"], r["updates"]) for r in left["trained"]] == [
        ("base", "finished", 0),
        *((run, "finished", 2) for run in runs),
    ]
    assert sorted(left["drift"]) == runs
    assert all(value > 0 for value in left["drift"].values())

    rows = [[0.0, 0.25], [0.75, 0.5], [0.5, 1.0]]
    scores = {
        "average_accuracy": 0.75,
        "forgetting": 0.25,
        "backward_transfer": -0.25,
        "forward_transfer": 0.25,
    }
    for method in ("sdft", "sft"):
        matrix = left["matrices"][method]
        assert [row[:2] for row in matrix] == rows
        assert [len(row) for row in matrix] == [3, 3, 3]  # general stands behind
        assert left["scores"][method] == pytest.approx(scores)
        assert left["by_hand"][method] == pytest.approx(scores)
    assert left.printed.rstrip().splitlines().count("All is done.") == 1  # nothing is trained again
    assert left.pictures == 1
