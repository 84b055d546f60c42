"""What was read of a benchmark is told; empty data and groups of one's own are refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sdft_lightning.data.benchmarks import Benchmarks
from sdft_lightning.data.benchmarks.tasks import load_tasks
from sdft_lightning.errors import UserError


def told(monkeypatch: pytest.MonkeyPatch, **options: object) -> str:
    """What is said of benchmarks; by a handler of our own, as others depend on earlier tests."""
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    ours = logging.getLogger("sdft_lightning")
    monkeypatch.setattr(ours, "handlers", [handler])
    monkeypatch.setattr(ours, "level", logging.INFO)
    ours.manager._clear_cache()  # type: ignore[attr-defined] # of levels
    load_tasks(Benchmarks(**options))  # type: ignore[arg-type]
    return "\n".join(message for message in said if message.startswith("benchmark "))


@pytest.mark.parametrize(("limit", "count"), [(None, 4), (2, 2), (0.5, 2), (100, 4)])
def test_a_task_says_how_many_documents_of_which_file_it_asks(
    limit: float | None,
    count: int,
    task_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = told(monkeypatch, tasks=[str(task_file)], limit=limit)
    data = task_file.parent / "choice.jsonl"
    assert line == f"benchmark {task_file}: {count} of 4 documents from {data}"


def test_documents_that_a_filter_drops_are_told(
    task_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task_file.parent / "kept.py").write_text(
        "def three(rows):\n    return rows.select(range(3))\n"
    )
    task_file.write_text(task_file.read_text() + "process_docs: !function kept.three\n")
    line = told(monkeypatch, tasks=[str(task_file)], allow_task_code=True)
    assert "3 of 3 documents" in line
    assert line.endswith("1 more are left out by process_docs")


def test_a_filter_that_leaves_nothing_is_an_error(task_file: Path) -> None:
    (task_file.parent / "none.py").write_text("def none(rows):\n    return rows.select([])\n")
    task_file.write_text(task_file.read_text() + "process_docs: !function none.none\n")
    with pytest.raises(
        UserError, match=r"choice\.yaml has no documents: .*choice\.jsonl.*leaves none"
    ):
        load_tasks(Benchmarks(tasks=[str(task_file)], allow_task_code=True))


@pytest.mark.parametrize("text", ["", "\n", "[]"])
def test_an_empty_file_is_named(text: str, task_file: Path) -> None:
    (task_file.parent / "choice.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"data\.benchmarks\.tasks: .*choice\.jsonl"):
        load_tasks(Benchmarks(tasks=[str(task_file)]))


@pytest.mark.parametrize(
    "text",
    [
        "group: mine\ntask: [hellaswag, {task: other}]\n",
        "task_list: [{task: hellaswag}, {task: other}]\n",
    ],
)
def test_a_group_of_ones_own_is_refused_with_its_tasks(text: str, tmp_path: Path) -> None:
    (tmp_path / "group.yaml").write_text(text)
    with pytest.raises(
        UserError, match=r"group of 2 tasks \(hellaswag, other\).*Name each of them"
    ):
        load_tasks(Benchmarks(tasks=[str(tmp_path / "group.yaml")]))


def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]\n")
    with pytest.raises(UserError, match=r"list\.yaml"):
        load_tasks(Benchmarks(tasks=[str(tmp_path / "list.yaml")]))
