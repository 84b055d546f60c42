"""The commands end to end on the tiny model: what they write, print and refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

RunCli = Callable[..., None]


def files(folder: Path) -> set[str]:
    """Paths below a folder, events files by their kind only."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {"events" if name.startswith("events.out.tfevents") else name for name in found}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def graded(train_file: Path) -> list[str]:
    """Options that grade the training rows as validation, test and predict set."""
    options = {
        "data.validation": train_file,
        "data.test": train_file,
        "data.predict": train_file,
        "data.grader": "contains",
        "data.columns.reference": "reference",
        "data.columns.id": "id",
    }
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture
def other(fit_args: list[str], graded: list[str]) -> Callable[..., list[str]]:
    """The arguments of another command on the same model and data."""
    return lambda command, *extra: [command, *fit_args[1:], *graded, *extra]


def test_fit_writes_only_below_its_run_folder(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path
) -> None:
    before = files(tmp_path)
    run_cli(*fit_args, "--trainer.log_every_n_steps=1")
    run = tmp_path / "runs" / "a"
    assert files(run) == {
        "checkpoints/last.ckpt",
        "checkpoints/step-2.ckpt",
        "config.yaml",
        "events",
        "hparams.yaml",
        "metrics.jsonl",
    }
    assert files(tmp_path) - before == {f"runs/a/{name}" for name in files(run) - {"events"}} | {
        str(path.relative_to(tmp_path)) for path in run.glob("events*")
    }
    assert [line["step"] for line in records(run / "metrics.jsonl")] == [1, 2]


def test_config_of_a_run_reproduces_it_bit_for_bit(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path
) -> None:
    run_cli(*fit_args, "--seed_everything=7", "--model.optimizer.lr=0.01")
    run_cli("fit", f"--config={tmp_path / 'runs/a/config.yaml'}", "--run.name=again")
    run_cli(*fit_args, "--seed_everything=8", "--model.optimizer.lr=0.01", "--run.name=other")
    found, again, other = (
        torch.load(tmp_path / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("a", "again", "other")
    )
    name = "student.model.norm.weight"
    for key, value in found["state_dict"].items():
        assert torch.equal(again["state_dict"][key], value)
    assert not torch.equal(other["state_dict"][name], found["state_dict"][name])


def test_print_config_round_trips_through_config(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for args in (fit_args, ["fit", "--config=printed.yaml"]):
        with pytest.raises(SystemExit) as stop:
            run_cli(*args, "--print_config")
        assert stop.value.code == 0
        texts.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(texts[-1])
    assert yaml.safe_load(texts[0]) == yaml.safe_load(texts[1])
    printed = yaml.safe_load(texts[0])
    assert printed["model"]["init_args"]["teacher"]["init_args"] == {
        "update_rate": 0.01,
        "every": 1,
    }
    assert printed["data"]["prompts"]["style"] == "turns"
    assert not (tmp_path / "runs").exists()


RUN = ["--config", "--run.name", "--model", "--model.policy.name"]
COMMON = {
    "fit": [
        *RUN,
        "--data.train",
        "--data.validation",
        "--data.grader",
        "--data.batch_size",
        "--trainer.accumulate_grad_batches",
        "--trainer.max_epochs",
        "--model.optimizer.init_args.lr",
        "--ckpt_path",
    ],
    "validate": [*RUN, "--data.validation", "--data.grader", "--ckpt_path"],
    "test": [*RUN, "--data.test", "--data.grader", "--ckpt_path"],
    "predict": [*RUN, "--data.predict", "--ckpt_path"],
    "export": [*RUN, "--ckpt_path", "--output_dir", "--format"],
}


@pytest.mark.parametrize("command", COMMON)
def test_help_exits_with_0_and_explains_the_options(
    command: str, run_cli: RunCli, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(command, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    words = ["--data.batch_size", "Prompts of a micro-batch", "--run.name", "Name of the run"]
    words += ["--ckpt_path", "--model.help"]
    words += ["--output_dir"] if command == "export" else []
    flat = " ".join(text.split())
    for word in words:
        assert word in flat
    assert text.startswith(f"usage: sdft {command} [--config FILE]... [--OPTION=VALUE]...\n\n")
    head = text.partition("common options:\n")[2].partition("\n\n")[0]
    assert text.index("common options:") < 300
    named = re.findall(r"^  (--[\w.]+) [A-Z]+ +\S", head, re.MULTILINE)
    assert named == COMMON[command]
    assert len(head.splitlines()) < 25
    assert "--trainer: Lightning's Trainer" in text


def test_help_of_a_method_explains_its_options(
    run_cli: RunCli, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli("fit", "--model.help=SDFTModule")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--model.sampling.temperature" in text
    assert "Logits are divided by it" in text
    assert "--model.num_loss_tokens_to_skip" in text


def test_method_is_chosen_by_class_path(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path
) -> None:
    args = [arg for arg in fit_args if "sampling" not in arg and arg != "--model=SDFTModule"]
    run_cli(*args, "--model=sdft_lightning.modules.SFTModule")
    checkpoint = torch.load(tmp_path / "runs/a/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["sdft_lightning"]["method"] == "SFTModule"
    assert all(name.startswith("student.") for name in checkpoint["state_dict"])


def answers_of(model: Any, tokenizer: Any, rows: list[dict[str, Any]], shown: bool) -> list[str]:
    """Greedy completions of the bare question, or of the demonstration and then the question."""
    texts = []
    for row in rows:
        question = {"role": "user", "content": row["prompt"]}
        answer = {"role": "assistant", "content": row["demonstration"]}
        messages = [question, answer, question] if shown else [question]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
            )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def test_validate_reports_the_accuracy_of_student_and_teacher_with_their_intervals(
    run_cli: RunCli,
    other: Callable[..., list[str]],
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
) -> None:
    rows = make_rows(8)
    student = answers_of(model, tokenizer, rows, shown=False)
    teacher = answers_of(model, tokenizer, rows, shown=True)
    for i, row in enumerate(rows):  # half right for the student, a quarter for the teacher
        right = [student[i]] * (i % 2) + [teacher[i]] * (i % 4 == 0)
        row["reference"] = [text for text in right if text.strip(" .")] or ["not said"]
    path = write_rows(rows, "graded.jsonl")
    expected = {
        "accuracy": sum(student[i] in rows[i]["reference"] for i in range(8)) / 8,
        "teacher_accuracy": sum(teacher[i] in rows[i]["reference"] for i in range(8)) / 8,
    }
    assert all(0 < value < 1 for value in expected.values())
    run_cli(*other("validate", f"--data.validation={path}", "--data.grader=exact"))

    (found,) = records(tmp_path / "runs/a/validate-0/metrics.jsonl")
    for name, value in expected.items():
        assert found[f"val/task/task/{name}"] == pytest.approx(value)
        assert found[f"val/task/task/{name}_low"] < value < found[f"val/task/task/{name}_high"]


@pytest.mark.parametrize("size", [1, 8])
def test_teacher_is_graded_in_the_rows_with_demonstration_whatever_the_batch_size(
    run_cli: RunCli,
    other: Callable[..., list[str]],
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    size: int,
) -> None:
    rows = make_rows(8)
    teacher = answers_of(model, tokenizer, rows, shown=True)
    for i, row in enumerate(rows):  # right in rows 0 and 3, of which the first has no demonstration
        row["reference"] = [teacher[i]] if i % 3 == 0 and teacher[i].strip(" .") else ["not said"]
    right = sum(teacher[i] in rows[i]["reference"] for i in range(1, 8))
    del rows[0]["demonstration"]
    path = write_rows(rows, "graded.jsonl")
    assert 0 < right < 7
    options = [f"--data.validation={path}", "--data.grader=exact", f"--data.eval_batch_size={size}"]
    run_cli(*other("validate", *options))
    (found,) = records(tmp_path / "runs/a/validate-0/metrics.jsonl")
    assert found["val/task/task/teacher_accuracy"] == pytest.approx(right / 7)
    assert "1 of 8 rows have no demonstration" in capsys.readouterr().err


def test_demonstrations_in_questions_to_answer_are_not_looked_at(
    run_cli: RunCli, other: Callable[..., list[str]], write_rows: Callable[..., Path]
) -> None:
    path = write_rows([{"prompt": "Q?", "demonstration": "It is so. " * 300}], "long.jsonl")
    options = [f"--data.predict={path}", "--data.columns.id=null", "--data.columns.reference=null"]
    run_cli(*other("predict", *options, "--data.lengths.demonstration=20", "--data.grader=null"))


def test_validate_and_test_of_a_checkpoint_write_into_folders_of_their_own(
    run_cli: RunCli, fit_args: list[str], other: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_cli(*fit_args)
    run = tmp_path / "runs" / "a"
    before = files(run)
    for _ in range(2):
        run_cli(*other("validate", "--ckpt_path=last"))
    run_cli(*other("test", "--ckpt_path=last"))
    folders = {name.split("/")[0] for name in files(run) - before}
    assert folders == {"validate-0", "validate-1", "test-0"}
    (tested,) = records(run / "test-0" / "metrics.jsonl")
    (validated,) = records(run / "validate-0" / "metrics.jsonl")
    assert tested["test/task/task/accuracy"] == validated["val/task/task/accuracy"]


def test_predict_writes_a_completion_for_each_row_and_never_over_older_ones(
    run_cli: RunCli,
    other: Callable[..., list[str]],
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
    make_rows: Callable[[int], list[dict[str, Any]]],
) -> None:
    for _ in range(2):
        run_cli(*other("predict", "--data.eval_batch_size=5"))
    first, second = (
        records(tmp_path / "runs" / "a" / f"predict-{n}" / "predictions.jsonl") for n in (0, 1)
    )
    assert first == second
    assert [line["id"] for line in first] == [f"row-{i}" for i in range(12)]
    expected = answers_of(model, tokenizer, make_rows(12), shown=False)
    assert [line["completion"] for line in first] == expected
    assert {type(line["truncated"]) for line in first} == {bool}


def test_base_model_may_be_validated_under_the_name_of_the_run_before_the_fit(
    run_cli: RunCli, fit_args: list[str], other: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_cli(*other("validate"))
    run_cli(*fit_args)
    assert "checkpoints/last.ckpt" in files(tmp_path / "runs" / "a")


def test_measuring_commands_say_whose_weights_they_measure(
    run_cli: RunCli,
    fit_args: list[str],
    other: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_cli(*other("validate"))
    told = capsys.readouterr().err
    assert "as it is, without a checkpoint" in told
    assert "--ckpt_path=last" not in told  # there is none yet
    run_cli(*fit_args)
    run_cli(*other("validate"))
    assert "--ckpt_path=last takes the newest checkpoint of this run" in capsys.readouterr().err
    run_cli(*other("test", "--ckpt_path=last"))
    assert "weights: the checkpoint runs/a/checkpoints/last.ckpt" in capsys.readouterr().err
