"""Bad input ends in seconds with exit code 2 and a message, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

RunCli = Callable[..., None]


class Case(NamedTuple):
    """What the train file holds (None leaves the good one), options, and what the message says."""

    text: str | None
    options: list[str]
    words: list[str]


def line(**row: Any) -> str:
    return json.dumps({"prompt": "Q?", "demonstration": "It is so.", **row}) + "\n"


GOOD = line()
TOOL_TURNS = [
    {"role": "assistant", "content": "Let me look."},
    {"role": "tool", "content": "open 7:30"},
    {"role": "assistant", "content": "We open at 7:30."},
]
HELD_OUT = '{"gen": {"source": "bad.jsonl", "grader": "contains"}}'
CASES = {
    "missing_file": Case(
        None, ["--data.train=absent.jsonl"], ["data.train", "absent.jsonl", "Correct the path"]
    ),
    "malformed_json": Case(
        GOOD + '{"prompt": "Q?", "demonstration"\n', [], ["bad.jsonl, line 2", "malformed JSON"]
    ),
    "missing_column": Case(
        GOOD,
        ["--data.columns.demonstration=answer"],
        ["data.columns.demonstration", "'answer'", "demonstration, prompt", "bad.jsonl"],
    ),
    "empty_demonstration": Case(
        GOOD + line(demonstration=" "), [], ["bad.jsonl, line 2", "demonstration", "is empty"]
    ),
    "no_user_turn": Case(
        line(prompt=[{"role": "system", "content": "Be brief."}]),
        [],
        ["bad.jsonl, line 1", "no user turn", "user's question"],
    ),
    "too_long_prompt": Case(
        GOOD + line(prompt="Q" * 300),
        ["--data.lengths.prompt=100"],
        [
            "bad.jsonl, line 2",
            "319 tokens",
            "data.lengths.prompt is 100",
            "raise data.lengths.prompt",
            "data.lengths.too_long: skip",
            "data.lengths.too_long: truncate",
        ],
    ),
    "no_room_in_the_model": Case(
        GOOD + line(demonstration="A" * 500),
        [],
        [
            "bad.jsonl, line 2",
            "and up to 8 new ones (model.sampling.max_new_tokens) do not fit into",
            "the model, which takes 512 (1 of 2 rows do not)",
            "Lower model.sampling.max_new_tokens",
        ],
    ),
    "too_long_teacher_prompt": Case(
        GOOD + line(demonstration="A" * 300),
        ["--data.lengths.teacher_prompt=200"],
        ["bad.jsonl, line 2", "data.lengths.teacher_prompt is 200", "Three remedies"],
    ),
    "unknown_grader": Case(
        None,
        ["--data.grader=bleu"],
        [
            "data.grader",
            "'bleu'",
            "choice, contains, exact, knowledge, knowledge_lenient, medical, token_f1, "
            "tool_call, tool_call_released",
        ],
    ),
    "missing_reference": Case(
        GOOD,
        [
            "--data.validation=bad.jsonl",
            "--data.grader=contains",
            "--data.columns.reference=reference",
        ],
        ["data.columns.reference", "'reference'", "demonstration, prompt"],
    ),
    "reference_of_the_wrong_form": Case(
        line(reference="maybe"),
        [
            "--data.validation=bad.jsonl",
            "--data.grader=choice",
            "--data.columns.reference=reference",
        ],
        ["bad.jsonl, line 1", "'choice'", "capital letter", "'maybe'"],
    ),
    "unknown_model_folder": Case(
        None,
        ["--model.policy.name=./absent/model"],
        ["model.policy.name", "./absent/model", "embedded", "save_pretrained", "Hub id"],
    ),
    "run_name_outside_the_root": Case(
        None, ["--run.name=../evil"], ["run.name", "'../evil'", "--run.root"]
    ),
    "seed_below_zero": Case(
        None, ["--seed_everything=-1"], ["seed_everything", "got -1", "0 to 4294967295"]
    ),
    "device_that_is_not_there": Case(
        None, ["--trainer.devices=0"], ["trainer:", "devices '0'", "accelerator 'cpu'", "`auto`"]
    ),
    "run_name_empty": Case(None, ["--run.name="], ["run.name", "got ''", "--run.root"]),
    "missing_checkpoint": Case(None, ["--ckpt_path=last"], ["ckpt_path", "last.ckpt", "none yet"]),
    "batch_larger_than_the_data": Case(
        GOOD, ["--data.batch_size=2"], ["data.batch_size", "1 training rows", "at most 1"]
    ),
    "temperature_zero": Case(
        None, ["--model.sampling.temperature=0"], ["sampling.temperature", "got 0", "above 0"]
    ),
    "cpt_without_a_context_column": Case(
        GOOD, ["--model=CPTModule"], ["data.columns.context", "bad.jsonl", "demonstration, prompt"]
    ),
    "cpt_with_an_empty_context": Case(
        line(context="Text.") + line(context=""),
        ["--model=CPTModule", "--data.columns.context=context"],
        ["bad.jsonl, line 2", "context", "is empty", "Fill it or remove the row"],
    ),
    "sft_kl_without_weight": Case(
        None, ["--model=SFTKLModule", "--model.kl_weight=0"], ["model.kl_weight", "SFTModule"]
    ),
    "offline_completions_of_other_rows": Case(
        line(id="a", completion="x"),
        [
            "--model=OfflineDistillationModule",
            "--model.completions=bad.jsonl",
            "--data.train=train.jsonl",
            "--data.columns.id=id",
        ],
        ["train.jsonl, line 1", "bad.jsonl has 0 completions", "'row-0'", "Add or remove"],
    ),
    "offline_completions_not_there": Case(
        None,
        ["--model=OfflineDistillationModule", "--model.completions=absent.jsonl"],
        ["model.completions", "absent.jsonl", "Correct the path"],
    ),
    "reinvoke_from_nowhere": Case(
        None,
        ["--model=ReinvokeModule", "--model.original.name=./absent/model"],
        ["model.original.name", "./absent/model", "save_pretrained"],
    ),
    "window_of_no_micro_batch": Case(
        None,
        ["--trainer.accumulate_grad_batches=0"],
        ["trainer.accumulate_grad_batches", "got 0", "1 and more"],
    ),
    "overfit_batches": Case(
        None,
        ["--trainer.overfit_batches=1"],
        ["trainer.overfit_batches", "got 1", "--trainer.limit_train_batches"],
    ),
    "all_tokens_skipped": Case(
        None,
        ["--model.num_loss_tokens_to_skip=8"],
        ["model.num_loss_tokens_to_skip", "got 8", "at most 8 tokens", "no token would be left"],
    ),
    "a_planned_rate_without_an_end": Case(
        None,
        ["--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--trainer.max_time=00:00:01:00"],
        ["model.schedule", "got cosine", "no last step", "--model.schedule.name=constant"],
    ),
    "callback_every_0_steps": Case(
        None,
        ["--trainer.callbacks+=CompletionLog", "--trainer.callbacks.every_n_steps=0"],
        ["CompletionLog.every_n_steps", "got 0", "1 and more"],
    ),
    "strip_every_0_steps": Case(
        None,
        ["--trainer.callbacks+=KLStrip", "--trainer.callbacks.every_n_steps=0"],
        ["KLStrip.every_n_steps", "got 0", "1 and more"],
    ),
    "export_every_0_steps": Case(
        None,
        ["--trainer.callbacks+=ExportModel", "--trainer.callbacks.every_n_steps=0"],
        ["ExportModel.every_n_steps", "got 0", "1 and more"],
    ),
    "sft_on_turns_of_others": Case(
        GOOD + line(demonstration=TOOL_TURNS),
        ["--model=SFTModule"],
        ["bad.jsonl, line 2", "turns of the role tool", "data.prompts.style: turns"],
    ),
    "tool_calls_that_nobody_reads": Case(
        line(demonstration=[{**TOOL_TURNS[0], "tool_calls": [{"name": "hours"}]}, TOOL_TURNS[2]]),
        [],
        ["bad.jsonl, line 1", "'demonstration' has tool_calls", "Write the call into the content"],
    ),
    "held_out_set_without_its_column": Case(
        GOOD,
        ["--data.train=train.jsonl", "--data.held_out", HELD_OUT],
        ["data.held_out.gen.columns.reference: bad.jsonl has no column 'reference'"],
    ),
    "no_training_file": Case(None, ["--data.train=null"], ["data.train", "`fit` needs it"]),
}

# jsonargparse's own words; it names the option, what is allowed and what it got.
PARSER_CASES = {
    "unknown_style": (
        ["--data.prompts.style=chat"],
        ["style", "paper", "turns", "context", "chat"],
    ),
    "unknown_divergence": (
        ["--model.divergence.name=wasserstein"],
        ["name", "forward_kl", "reverse_kl", "wasserstein"],
    ),
    "unknown_reaction": (
        ["--data.lengths.too_long=cut"],
        ["too_long", "error", "skip", "truncate", "cut"],
    ),
    "unknown_option": (["--model.learning_rate=1"], ["learning_rate"]),
    "unknown_method": (["--model=RLModule"], ["model", "RLModule"]),
    "unknown_teacher": (["--model.teacher=Oracle"], ["teacher", "Oracle"]),
    "text_for_a_number": (["--data.batch_size=many"], ["batch_size", "many", "int"]),
    "config_that_is_not_there": (["--config=absent.yaml"], ["absent.yaml"]),
}


def assert_refused(
    run_cli: RunCli, args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """The command exits with 2, says all words, and shows no traceback; returns its message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(*args)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in message
    assert "error" in message
    for word in words:
        assert word in message, message
    return message


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_before_training_and_leaves_no_run_behind(
    name: str,
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES[name]
    args = [*fit_args]
    if case.text is not None:
        (tmp_path / "bad.jsonl").write_text(case.text, encoding="utf-8")
        args += ["--data.train=bad.jsonl", "--data.batch_size=1"]
    message = assert_refused(run_cli, [*args, *case.options], case.words, capsys)
    assert message.count("error: ") == 1
    assert files(tmp_path / "runs") == []


@pytest.mark.parametrize("name", PARSER_CASES)
def test_parser_names_the_option_what_is_allowed_and_what_it_got(
    name: str,
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, words = PARSER_CASES[name]
    assert_refused(run_cli, [*fit_args, *options], words, capsys)
    assert files(tmp_path / "runs") == []


@pytest.mark.parametrize("option", ["train", "validation"])
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("none.jsonl", "", ["data.{}: none.jsonl has no rows"]),
        (
            "rows.csv",
            "prompt,demonstration\nQ?,It is so.\n",
            ["data.{}: rows.csv ends in .csv", ".jsonl"],
        ),
        ("one.json", '{"repo": "a/b", "split": "train"}', ["one.json has no column 'prompt'"]),
    ],
)
def test_a_data_file_is_never_read_as_options(
    option: str,
    name: str,
    text: str,
    words: list[str],
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    args = [*fit_args, f"--data.{option}={name}"]
    assert_refused(run_cli, args, [word.format(option) for word in words], capsys)
    assert files(tmp_path / "runs") == []


def test_a_run_may_be_started_again_under_its_name_after_bad_input_was_mended(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [*fit_args, "--data.columns.demonstration=answer"]
    assert_refused(run_cli, bad, ["data.columns.demonstration"], capsys)
    run_cli(*fit_args)
    assert (tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt").is_file()


@pytest.fixture
def trained(run_cli: RunCli, fit_args: list[str], tmp_path: Path) -> Path:
    """A run of two steps in runs/a."""
    run_cli(*fit_args)
    return tmp_path / "runs" / "a"


def test_folder_of_a_run_is_not_trained_into_without_ckpt_path(
    trained: Path, run_cli: RunCli, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (trained / name).read_bytes() for name in files(trained)}
    words = ["run.name", "runs/a already holds a run", "--run.name", "--ckpt_path=last"]
    assert_refused(run_cli, fit_args, words, capsys)
    assert {name: (trained / name).read_bytes() for name in files(trained)} == before


def test_checkpoint_of_another_run_is_not_continued_in_this_runs_folder(
    trained: Path, run_cli: RunCli, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_cli(*fit_args, "--run.name=b")
    before = files(trained)
    other = f"--ckpt_path={trained.parent / 'b' / 'checkpoints' / 'last.ckpt'}"
    words = ["run.name", "runs/a already holds a run", "is not one of its checkpoints"]
    assert_refused(run_cli, [*fit_args, other], words, capsys)
    assert files(trained) == before


@pytest.mark.parametrize("command", ["fit", "validate", "export"])
def test_checkpoint_of_another_model_is_refused_and_both_are_named(
    command: str,
    trained: Path,
    run_cli: RunCli,
    fit_args: list[str],
    train_file: Path,
    make_model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_model_folder(hidden_size=16)
    args = [command, *fit_args[1:], f"--model.policy.name={other}", "--ckpt_path=last"]
    args += [f"--data.validation={train_file}"] if command == "validate" else []
    args = [arg for arg in args if command == "fit" or not arg.startswith("--trainer.max_steps")]
    before = files(trained)
    words = ["ckpt_path", "another architecture", str(other), "'hidden_size': 32", "16"]
    assert_refused(run_cli, args, words, capsys)
    assert files(trained) == before


def test_checkpoint_of_another_method_is_refused(
    trained: Path, run_cli: RunCli, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = [arg for arg in fit_args if "sampling" not in arg]
    args = [*args, "--model=SFTModule", "--ckpt_path=last"]
    args.remove("--model=SDFTModule")
    words = ["ckpt_path", "another method", "SDFTModule", "SFTModule"]
    assert_refused(run_cli, args, words, capsys)


def test_broken_checkpoint_is_refused_without_a_traceback(
    trained: Path, run_cli: RunCli, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained / "checkpoints" / "last.ckpt"
    path.write_bytes(b"no checkpoint")
    words = ["ckpt_path", "last.ckpt", "cannot be read as a checkpoint"]
    assert_refused(run_cli, [*fit_args, f"--ckpt_path={path}"], words, capsys)


def test_lightning_checkpoint_of_another_program_is_refused(
    trained: Path, run_cli: RunCli, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    path = trained / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["sdft_lightning"]
    torch.save(checkpoint, path)
    words = ["ckpt_path", "not written by sdft_lightning", "--model.policy.name"]
    assert_refused(run_cli, [*fit_args, "--ckpt_path=last"], words, capsys)
