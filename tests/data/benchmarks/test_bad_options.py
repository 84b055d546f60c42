"""What is wrong with benchmarks is told before a run starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkSuite, task_yaml
from sdft_lightning.errors import UserError


def validations(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["stage"] == "validation"]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"tasks": ["hellaswagg"]}, ["no task 'hellaswagg'", "hellaswag", "lm-eval ls tasks"]),
        ({"tasks": ["missing.yaml"]}, ["there is no file missing.yaml"]),
        ({"mean": "all"}, ["data.benchmarks.mean", "'alike', 'any', 'off'", "all"]),
        ({"limit": 1.5}, ["data.benchmarks.limit", "1.5"]),
    ],
)
def test_bad_options_name_the_remedy(
    run_cli: Callable[..., None],
    fit_args: list[str],
    benchmark_args: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    wanted: list[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(*fit_args, *benchmark_args(**settings))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    for text in wanted:
        assert text in message


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"metric: acc}": "metric: acc}", "METRIC": "f1"}, ["no metric 'f1'", "acc"]),
        ({"choice.jsonl": "other.jsonl"}, ["other.jsonl", "data_dir"]),
        ({"task: tiny_choice": "same_as: hellaswagg"}, ["same_as", "'hellaswagg'"]),
        ({"task: tiny_choice": ""}, ["names no task"]),
        ({"dataset_path: json": "dataset_path: no-such/data"}, ["cannot be had", "Remedy"]),
    ],
)
def test_a_bad_task_file_is_named(
    run_cli: Callable[..., None],
    fit_args: list[str],
    task_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    wanted: list[str],
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    text = task_file.read_text()
    for old, new in change.items():
        text = text.replace(old, new)
    if "no-such" in text:
        text = text.replace("dataset_kwargs: {data_files: {validation: choice.jsonl}}", "")
    task_file.write_text(text)
    metric = change.get("METRIC", "acc")
    with pytest.raises(SystemExit) as stopped:
        run_cli(
            *fit_args,
            "--data.benchmarks",
            json.dumps({"tasks": [{"name": str(task_file), "metric": metric}]}),
        )
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    for wish in wanted:
        assert wish in message


@pytest.mark.parametrize("options", [{}, {"allow_code_execution": True}])
def test_a_task_that_runs_code_is_refused_before_its_own_code_is_imported(
    tmp_path: Path, model_folder: Path, options: dict[str, Any]
) -> None:
    sys.modules.pop("lm_eval.tasks.humaneval.utils", None)
    file = tmp_path / "mine.yaml"
    file.write_text("same_as: humaneval_plus\ntask: mine\n")
    with pytest.raises(UserError, match=r"mine\.yaml would run code .* outside our sandbox"):
        BenchmarkSuite(Benchmarks([str(file)], **options), str(model_folder))
    assert "lm_eval.tasks.humaneval.utils" not in sys.modules


@pytest.mark.parametrize(
    "raised",
    [
        "ModuleNotFoundError('No module named x')",
        "FileNotFoundError('code_eval')",
        "ZeroDivisionError()",
    ],
)
def test_code_behind_same_as_that_cannot_be_imported_is_told_with_its_task(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, raised: str
) -> None:
    (tmp_path / "broken_code.py").write_text(f"raise {raised}\n")
    origin = tmp_path / "theirs.yaml"
    origin.write_text("task: theirs\nprocess_docs: !function broken_code.docs\n")
    monkeypatch.setattr(task_yaml, "harness_yaml", lambda name: origin)
    file = tmp_path / "mine.yaml"
    file.write_text("same_as: theirs\ntask: mine\n")
    with pytest.raises(UserError) as refused:
        BenchmarkSuite(Benchmarks([str(file)]), str(model_folder))
    for text in ("mine.yaml", "theirs", raised.partition("(")[0], "Install the package"):
        assert text in str(refused.value)


def test_code_of_a_task_file_that_cannot_be_imported_is_told_with_its_file(
    task_file: Path, model_folder: Path
) -> None:
    task_file.with_name("broken_code.py").write_text("1 / 0\n")
    with task_file.open("a") as file:
        file.write("process_docs: !function broken_code.docs\n")
    options = Benchmarks([str(task_file)], allow_task_code=True)
    with pytest.raises(UserError, match=r"choice\.yaml cannot be read: ZeroDivisionError"):
        BenchmarkSuite(options, str(model_folder))


def test_unlike_metrics_are_averaged_only_on_demand(
    run_cli: Callable[..., None],
    fit_args: list[str],
    task_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = task_file.with_name("other.yaml")
    other.write_text(
        task_file.read_text(encoding="utf-8").replace("tiny_choice", "tiny_norm"), encoding="utf-8"
    )
    tasks = [
        {"name": str(task_file), "metric": "acc"},
        {"name": str(other), "metric": "acc_norm"},
    ]
    with pytest.raises(SystemExit):
        run_cli(*fit_args, "--data.benchmarks", json.dumps({"tasks": tasks}))
    message = capsys.readouterr().err
    assert "acc of tiny_choice" in message
    assert "acc_norm of tiny_norm" in message
    run_cli(*fit_args, "--data.benchmarks", json.dumps({"tasks": tasks, "mean": "any"}))
    record = validations(tmp_path / "runs" / "a")[-1]
    values = [record["val/capability/tiny_choice/acc"], record["val/capability/tiny_norm/acc_norm"]]
    assert record["val/capability/mean"] == pytest.approx(sum(values) / 2)


@pytest.mark.parametrize("limit", ["1", "0.5"])
def test_part_of_the_batches_is_refused(
    run_cli: Callable[..., None],
    fit_args: list[str],
    benchmark_args: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    limit: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(*fit_args, *benchmark_args(), f"--trainer.limit_val_batches={limit}")
    assert stopped.value.code == 2
    assert "trainer.limit_val_batches" in capsys.readouterr().err


def test_the_same_task_twice_is_refused(
    run_cli: Callable[..., None],
    fit_args: list[str],
    task_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = [str(task_file), str(task_file)]
    with pytest.raises(SystemExit):
        run_cli(*fit_args, "--data.benchmarks", json.dumps({"tasks": tasks}))
    assert "both measure tiny_choice" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["choice", "rolling", "generation"])
def test_a_request_with_a_token_that_has_no_embedding_is_told_with_task_and_token(
    name: str, task_folder: Path, make_model_folder: Callable[..., Path], tokenizer: Any
) -> None:
    # The last token of the vocabulary, which the model's embeddings leave out, in one text.
    size = len(tokenizer) - 1
    characters = (chr(code) for code in range(128, 700))
    last = next(c for c in characters if max(tokenizer(c).input_ids) == size)
    for file in task_folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for key in rows[1].keys() & {"question", "text"}:
            rows[1][key] += f" {last} and so on"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = make_model_folder(vocab_size=size)
    with pytest.raises(UserError, match=rf"tiny_{name} has the token .* id {size}, .* only {size}"):
        BenchmarkSuite(Benchmarks([str(task_folder / f"{name}.yaml")]), str(folder))
