"""Runs compare what they measure with what was measured before training, item by item."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.graders import mcnemar

RunCli = Callable[..., None]
ACC, ACCURACY = "tiny_choice/acc_norm", "task/accuracy"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def validations(folder: Path) -> list[dict[str, Any]]:
    return [r for r in lines(folder / "metrics.jsonl") if r["stage"] == "validation"]


def scores(folder: Path, name: str) -> dict[int, dict[str, float]]:
    """The scores of a set and metric by step, as item_scores.jsonl has them."""
    return {
        line["step"]: line["scores"]
        for line in lines(folder / "item_scores.jsonl")
        if f"{line['task']}/{line['metric']}" == name
    }


def paired(record: dict[str, Any], name: str) -> tuple[float, float, float]:
    lost, gained, p = (record[f"val/paired/{name}/{what}"] for what in ("lost", "gained", "p"))
    return lost, gained, p


def by_hand(before: dict[str, float], now: dict[str, float]) -> tuple[float, float, float]:
    """What is lost and gained, and p, from the scores in the file."""
    import numpy as np

    assert before.keys() == now.keys()
    first, second = (np.array([each[key] for key in before]) for each in (before, now))
    test = mcnemar(first, second)
    assert test is not None
    return test.only_first, test.only_second, test.p


@pytest.fixture
def graded_args(
    fit_args: list[str], benchmark_args: Callable[..., list[str]], train_file: Path
) -> Callable[..., list[str]]:
    """A fit with a graded set and a benchmark, whose answers change soon."""

    def arguments(*more: str, **benchmarks: Any) -> list[str]:
        return [
            *fit_args,
            *benchmark_args(**benchmarks),
            f"--data.validation={train_file}",
            "--data.columns.reference=reference",
            "--data.columns.id=id",
            "--data.grader=contains",
            "--model.optimizer=torch.optim.AdamW",
            "--model.optimizer.lr=3e-2",
            "--model.schedule.name=constant",
            "--trainer.max_steps=4",
            "--trainer.val_check_interval=1",
            "--trainer.check_val_every_n_epoch=null",
            *more,
        ]

    return arguments


def test_validations_of_a_fit_are_compared_with_the_one_before_the_first_step(
    run_cli: RunCli, graded_args: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_cli(*graded_args("--trainer.num_sanity_val_steps=1", every_n_validations=2))
    folder = tmp_path / "runs" / "a"
    found = validations(folder)
    assert [r["step"] for r in found] == [0, 1, 2, 3, 4]
    accs, accuracies = scores(folder, ACC), scores(folder, ACCURACY)
    assert list(accs) == [0, 2, 4], "benchmarks are due every second time"
    assert list(accuracies) == [0, 1, 2, 3, 4], "and what is graded always; no sanity check"
    assert len(accs[0]) == 4
    assert len(accuracies[0]) == 12
    for record in found:
        step = record["step"]
        assert paired(record, ACCURACY) == by_hand(accuracies[0], accuracies[step])
        known = f"val/paired/{ACC}/p" in record
        assert known == (f"val/capability/{ACC}" in record)
        if known:
            assert paired(record, ACC) == by_hand(accs[0], accs[step])
    assert paired(found[0], ACC) == (0, 0, 1)
    assert paired(found[-1], ACC)[0] > 0, "nothing is lost: the test would show nothing"
    assert paired(found[-1], ACCURACY)[1] > 0, "nothing is gained: the test would show nothing"


def test_a_resumed_run_and_validate_know_what_was_measured_before_the_first_step(
    run_cli: RunCli,
    graded_args: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_cli(*graded_args())
    straight = validations(tmp_path / "runs" / "a")
    run_cli(*graded_args("--run.name=b", "--trainer.max_steps=2"))
    run_cli(*graded_args("--run.name=b", "--ckpt_path=last"))
    halved = validations(tmp_path / "runs" / "b")
    assert [r["step"] for r in halved] == [0, 1, 2, 3, 4]

    def of_paired(record: dict[str, Any]) -> dict[str, Any]:
        return {name: x for name, x in record.items() if "/paired/" in name}

    assert of_paired(halved[-1]) == of_paired(straight[-1])
    assert {f"val/paired/{name}/p" for name in (ACC, ACCURACY)} <= of_paired(halved[-1]).keys()
    capsys.readouterr()
    fit_only = ("--model.optimizer", "--model.schedule", "--trainer.max_steps", "--run.name")
    args = [arg for arg in graded_args()[1:] if not arg.startswith(fit_only)]
    run_cli("validate", *args, "--run.name=b", "--ckpt_path=last")
    (measured,) = validations(tmp_path / "runs" / "b" / "validate-0")
    assert paired(measured, ACC) == paired(straight[-1], ACC)
    printed = capsys.readouterr().out
    base = "Compared with the model before the first step, as in runs/b/item_scores.jsonl:"
    assert base in printed.splitlines()
    lost, gained, p = paired(measured, ACC)
    (row,) = [r for r in printed.splitlines() if "  acc_norm " in r and "lost" in r]
    shown = f"{lost:.0f} lost, {gained:.0f} gained of 4, p {p:.2f}"
    assert row.endswith(f"  {shown}")


def without_base(args: list[str]) -> list[str]:
    """A fit that measures nothing before its first step: one without benchmarks."""
    place = args.index("--data.benchmarks")
    return [*args[:place], *args[place + 2 :]]


def test_where_nothing_was_measured_before_nothing_is_logged_and_validate_says_why(
    run_cli: RunCli,
    graded_args: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_cli(*without_base(graded_args()))
    found = validations(tmp_path / "runs" / "a")
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    assert not [name for record in found for name in record if "/paired/" in name]
    assert "not compared item by item" not in capsys.readouterr().err
    fit_only = ("--model.optimizer", "--model.schedule", "--trainer.max_steps")
    args = [arg for arg in without_base(graded_args())[1:] if not arg.startswith(fit_only)]
    run_cli("validate", *args)
    told = [x for x in capsys.readouterr().err.splitlines() if "not compared item by item" in x]
    assert len(told) == 1
    assert "nothing was measured before the first step. model.evaluation.compare_with" in told[0]


def test_a_run_is_compared_with_the_one_that_compare_with_names(
    run_cli: RunCli,
    graded_args: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_cli(*graded_args("--trainer.max_steps=1"))
    before = scores(tmp_path / "runs" / "a", ACCURACY)[0]
    name = "--model.evaluation.compare_with=runs/a"
    args = without_base(graded_args("--run.name=b", name, "--trainer.max_steps=2"))
    run_cli(*args)
    folder = tmp_path / "runs" / "b"
    found = validations(folder)
    assert [r["step"] for r in found] == [1, 2]
    for record in found:
        assert paired(record, ACCURACY) == by_hand(before, scores(folder, ACCURACY)[record["step"]])
        assert f"val/paired/{ACC}/p" not in record, "which was not measured here"
    # The same rows with another question are other items.
    rows = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows[0] = json.dumps({**json.loads(rows[0]), "prompt": "Something else?"})
    (tmp_path / "other.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    capsys.readouterr()
    run_cli(*args, "--run.name=c", "--data.validation=other.jsonl")
    found = validations(tmp_path / "runs" / "c")
    assert not [n for record in found for n in record if "/paired/" in n]
    assert "with runs/a: other items of task/accuracy" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["runs/none", "runs/a", "broken.jsonl"])
def test_what_compare_with_cannot_read_is_refused_before_a_model_is_loaded(
    given: str,
    run_cli: RunCli,
    graded_args: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sdft_lightning.modules.base.load_policy", pytest.fail)
    measured = tmp_path / "runs" / "a" / "validate-0"
    measured.mkdir(parents=True)
    (measured / "item_scores.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text('{"scores": 3}\n', encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        run_cli(*graded_args("--run.name=b", f"--model.evaluation.compare_with={given}"))
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"model.evaluation.compare_with: {'' if 'broken' in given else 'there is no file '}" in (
        message
    )
    assert given in message
    assert "Allowed is the folder of a run" in message
    assert ("line 1" in message) == ("broken" in given)
    assert ("runs/a/validate-0/item_scores.jsonl" in message) == (given == "runs/a")
    assert not (tmp_path / "runs" / "b").exists()


@pytest.mark.slow
def test_two_processes_compare_what_one_does(
    model_folder: Path, task_folder: Path, train_file: Path, tmp_path: Path
) -> None:
    tasks = [str(task_folder / f"{name}.yaml") for name in ("choice", "rolling", "generation")]

    def measure(name: str, devices: int, *more: str) -> Path:
        command = [sys.executable, "-m", "sdft_lightning.cli", "validate", "--model=SDFTModule"]
        command += [f"--model.policy.name={model_folder}", "--trainer.accelerator=cpu"]
        command += [f"--trainer.devices={devices}", f"--run.name={name}", "--data.grader=contains"]
        command += [f"--data.train={train_file}", f"--data.validation={train_file}"]
        command += ["--data.columns.reference=reference", "--data.columns.id=id"]
        command += ["--model.evaluation.max_new_tokens=4", "--model.policy.sampling_dtype=same"]
        command += ["--data.prompts.style=turns", "--data.eval_batch_size=5"]
        command += ["--data.benchmarks", json.dumps({"tasks": tasks, "batch_size": 2})]
        command += ["--trainer.strategy=ddp"] if devices > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, *more],
            cwd=tmp_path,
            check=True,
            timeout=240,
            capture_output=True,
            env=environment,
        )
        return tmp_path / "runs" / name / "validate-0"

    base = lines(measure("base", 1) / "item_scores.jsonl")
    assert {(each["kind"], each["metric"]) for each in base} == {
        ("task", "accuracy"),
        ("task", "teacher_accuracy"),
        ("capability", "acc"),
        ("capability", "acc_norm"),
        ("capability", "word_perplexity"),
        ("capability", "exact_match"),
    }
    for line in base:  # as if another model had answered
        for place, (key, score) in enumerate(sorted(line["scores"].items())):
            other = score - 1.25 * place if "weights" in line else float(place % 3 == 0)
            line["scores"][key] = other
    text = "".join(json.dumps(line) + "\n" for line in base)
    (tmp_path / "other.jsonl").write_text(text, encoding="utf-8")
    compare = "--model.evaluation.compare_with=other.jsonl"
    one, two = (measure(f"on{n}", n, compare) for n in (1, 2))
    first, second = validations(one)[0], validations(two)[0]
    known = [name for name in first if name.startswith("val/paired/")]
    assert len(known) == 3 * len(base)
    assert {n: first[n] for n in known} == pytest.approx({n: second[n] for n in known})
    assert first["val/paired/tiny_choice/acc/gained"] + first["val/paired/tiny_choice/acc/lost"] > 0
    assert first["val/paired/tiny_rolling/word_perplexity/gained"] == 3
    for mine, theirs in zip(*(lines(f / "item_scores.jsonl") for f in (one, two)), strict=True):
        assert mine.pop("scores") == pytest.approx(theirs.pop("scores"), abs=1e-4)
        assert mine == theirs
