"""What a preflight measures, on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.preflight.measure import ARTIFACTS, _copies, _others
from sdft_lightning.types import Demonstration


@pytest.fixture
def preflight_args(fit_args: list[str]) -> list[str]:
    left_out = ("--trainer.max_steps", "--trainer.enable_model_summary")
    kept = [arg for arg in fit_args[1:] if not arg.startswith(left_out)]
    return ["preflight", *kept, "--data.grader=contains", "--data.columns.reference=reference"]


def test_preflight_writes_what_it_measured_and_trains_nothing(
    run_cli: Callable[..., None],
    preflight_args: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (model_folder / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        run_cli(*preflight_args, "--rows=5")
    assert stopped.value.code == 2  # random weights learn nothing from a demonstration
    folder = tmp_path / "runs" / "a" / "preflight-0"
    found = json.loads((folder / "preflight.json").read_text())
    assert found["verdict"] == "use SFT"
    assert found["rows"] == 5
    assert found["kl"] > 0
    assert found["kl_of_manner"] > 0
    assert found["kl_of_manner"] != found["kl"]
    options = ["--data.retain=example:retain/prompts.jsonl", "--model.initial_copy=true"]
    assert found["retaining_options"] == options  # an EMA teacher moves away
    assert found["step_seconds"] > 0
    assert found["memory_gb"] > 0
    assert found["max_length"] == 512
    assert found["left_out"] == 0
    assert 0 < found["prompt_tokens"] < found["teacher_prompt_tokens"]
    printed = capsys.readouterr().out
    assert "Verdict: use SFT" in printed
    assert "teacher, another row's" in printed
    assert (model_folder / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "runs" / "a" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--model.teacher=FrozenTeacher"], ["--data.retain=example:retain/prompts.jsonl"]),
        (["--data.retain={train}", "--model.initial_copy=true"], []),
    ],
)
def test_options_to_retain_are_those_that_the_run_lacks(
    options: list[str],
    wanted: list[str],
    run_cli: Callable[..., None],
    preflight_args: list[str],
    train_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(SystemExit):
        run_cli(*preflight_args, "--rows=2", *(each.format(train=train_file) for each in options))
    found = json.loads((tmp_path / "runs" / "a" / "preflight-0" / "preflight.json").read_text())
    assert found["retaining_options"] == wanted


def test_a_fit_may_follow_in_the_same_run(
    run_cli: Callable[..., None], preflight_args: list[str], fit_args: list[str], tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit):
            run_cli(*preflight_args, "--rows=2")
    run_cli(*fit_args)
    names = {path.name for path in (tmp_path / "runs" / "a").iterdir()}
    assert {"preflight-0", "preflight-1", "checkpoints"} <= names


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["--model=SFTModule"], "SFTModule has none"),
        (["--model=OfflineDistillationModule"], "OfflineDistillationModule has none"),
        (
            ["--model=ReinvokeModule", "--model.original.name={model_folder}"],
            "ReinvokeModule has none",
        ),
        (["--rows=1"], "preflight.rows: got 1 of 12"),
        (["--limits.gain=7"], "limits.gain"),
    ],
)
def test_bad_options(
    run_cli: Callable[..., None],
    preflight_args: list[str],
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    changes: list[str],
    wanted: str,
) -> None:
    args = [arg for arg in preflight_args if not arg.startswith("--model.sampling")]
    if changes[0].startswith("--model="):
        args.remove("--model=SDFTModule")
        args[1:1] = [change.format(model_folder=model_folder) for change in changes]
        changes = []
    with pytest.raises(SystemExit) as stopped:
        run_cli(*args, *changes)
    assert stopped.value.code == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("option", ["train", "validation"])
def test_rows_that_are_too_long_are_counted_and_no_go_while_a_fit_stops_at_the_first(
    run_cli: Callable[..., None],
    preflight_args: list[str],
    fit_args: list[str],
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    rows = make_rows(12)
    for number in (3, 7):
        rows[number]["prompt"] = "Q" * 100
    changes = [f"--data.{option}={write_rows(rows, 'long.jsonl')}", "--data.lengths.prompt=80"]
    with pytest.raises(SystemExit) as stopped:
        run_cli(*preflight_args, *changes, "--rows=2")
    assert stopped.value.code != 0
    found = json.loads((tmp_path / "runs/a/preflight-0/preflight.json").read_text())
    (told,) = found["too_long"]
    assert told in found["reasons"]
    for text in (f"data.{option}: 2 of 12 rows", "long.jsonl, line 4", "data.lengths.prompt is 80"):
        assert text in told
    for remedy in ("raise data.lengths.prompt", "too_long: skip", "too_long: truncate"):
        assert remedy in told
    assert told in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_cli(*fit_args, "--data.grader=contains", "--data.columns.reference=reference", *changes)
    assert "long.jsonl, line 4: too long" in capsys.readouterr().err


def row(
    number: int, demonstration: str, reference: str, context: str | None = None
) -> Demonstration:
    shown = [{"role": "assistant", "content": demonstration}]
    return Demonstration(str(number), [], shown, context, [reference], "file")


def test_another_row_s_demonstration_is_really_another() -> None:
    rows = [row(0, "a", "x"), row(1, "a", "x"), row(2, "b", "x"), row(3, "c", "y")]
    found = [int(other.id) for other in _others(rows)]
    assert found == [3, 3, 3, 0]  # the next with another text and another answer


def test_the_other_row_has_another_context_where_there_is_one() -> None:
    rows = [
        row(0, "a", "x", "A"),
        row(1, "b", "y", "A"),
        row(2, "a", "x", "B"),
        row(3, "c", "z", "C"),
    ]
    # Row 1 would do for row 0 but for the text that they share, row 2 but for its answer.
    assert [int(other.id) for other in _others(rows)] == [3, 2, 3, 0]


def test_rows_that_share_their_only_context_still_get_another_answer() -> None:
    rows = [row(0, "a", "x", "A"), row(1, "a", "x", "A"), row(2, "b", "y", "A")]
    assert [int(other.id) for other in _others(rows)] == [2, 2, 0]


def test_the_other_teacher_sees_nothing_of_the_row_s_own_context(
    run_cli: Callable[..., None], preflight_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdft_lightning.data import DemonstrationDataModule

    seen: list[Demonstration] = []
    batch_of = DemonstrationDataModule.batch_of

    def watched(self: Any, rows: Any) -> Any:
        seen.extend(rows)
        return batch_of(self, rows)

    monkeypatch.setattr(DemonstrationDataModule, "batch_of", watched)
    with pytest.raises(SystemExit):
        run_cli(
            *preflight_args,
            "--data.prompts.style=context",
            "--data.columns.context=context",
            "--rows=4",
        )
    own, swapped = seen[:4], seen[4:8]
    assert [row.prompt for row in swapped] == [row.prompt for row in own]
    for row, other in zip(own, swapped, strict=True):
        assert other.context != row.context
        source = next(each for each in own if each.context == other.context)
        assert other.demonstration == source.demonstration  # both from the same row


def test_where_all_say_the_same_the_next_row_stands_in() -> None:
    rows = [row(0, "a", "x"), row(1, "a", "x")]
    assert [other.id for other in _others(rows)] == ["1", "0"]


@pytest.mark.parametrize(
    ("text", "talks"),
    [
        ("Based on the text, it costs $48.", True),
        ("The passage does not say.", True),
        ("As mentioned in the example, yes.", True),
        ("According to the information, no.", True),
        ("It costs $48.", False),
        ("My favourite text is long.", False),
    ],
)
def test_artifacts(text: str, talks: bool) -> None:
    assert bool(ARTIFACTS.search(text)) == talks


@pytest.mark.parametrize(
    ("text", "shown", "copies"),
    [
        ("It costs  $48.", "it costs $48.", True),
        ("Well: It costs $48. Thanks", "It costs $48.", True),
        ("It costs", "It costs $48.", True),
        ("The price is $48.", "It costs $48.", False),
        ("", "It costs $48.", False),
    ],
)
def test_copies(text: str, shown: str, copies: bool) -> None:
    assert _copies(text, shown) == copies


def test_measuring_does_not_move_the_student(
    run_cli: Callable[..., None],
    preflight_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sdft_lightning.cli import run_trainer

    seen: dict[str, Any] = {}

    def watched(module: Any, *args: Any) -> Any:
        from sdft_lightning.preflight import run_preflight

        before = {name: p.detach().clone() for name, p in module.student.named_parameters()}
        report = run_preflight(module, *args)
        seen["same"] = all(
            torch.equal(before[name], p) and p.grad is None
            for name, p in module.student.named_parameters()
        )
        return report

    monkeypatch.setattr(run_trainer, "run_preflight", watched)
    with pytest.raises(SystemExit):
        run_cli(*preflight_args, "--rows=2")
    assert seen["same"]


def test_rows_without_a_reference_are_told_and_the_others_graded(
    run_cli: Callable[..., None],
    preflight_args: list[str],
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = make_rows(6)
    rows[2]["reference"] = None
    path = write_rows(rows, "some.jsonl")
    with pytest.raises(SystemExit):
        run_cli(*preflight_args, "--rows=6", f"--data.train={path}")
    folder = tmp_path / "runs" / "a" / "preflight-0"
    found = json.loads((folder / "preflight.json").read_text())
    assert found["student"]["accuracy"] is not None
    shown = capsys.readouterr()
    assert "1 of 6 sampled rows have no reference" in shown.err + shown.out


def test_a_training_reference_that_the_grader_does_not_take_is_named(
    run_cli: Callable[..., None],
    preflight_args: list[str],
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = make_rows(6)
    rows[4]["reference"] = 10
    path = write_rows(rows, "some.jsonl")
    monkeypatch.setattr("sdft_lightning.modules.base.load_policy", pytest.fail)
    with pytest.raises(SystemExit) as stopped:
        run_cli(*preflight_args, f"--data.train={path}")
    assert stopped.value.code == 2
    assert "some.jsonl, line 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (lambda rows, i: rows[i]["demonstration"], 1.0),
        (lambda rows, i: rows[i - 1]["demonstration"], 0.0),  # shuffled among the rows
        (lambda rows, i: "A good question.", 0.0),  # empty words
    ],
    ids=["as they are", "shuffled", "empty words"],
)
def test_demonstrations_are_graded_in_their_own_rows(
    change: Callable[..., str],
    right: float,
    run_cli: Callable[..., None],
    preflight_args: list[str],
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = make_rows(8)
    changed = [{**row, "demonstration": change(rows, i)} for i, row in enumerate(rows)]
    with pytest.raises(SystemExit):
        run_cli(*preflight_args, "--rows=4", f"--data.train={write_rows(changed, 'some.jsonl')}")
    found = json.loads((tmp_path / "runs/a/preflight-0/preflight.json").read_text())
    assert found["demonstrations_right"] == right
    told = any("stand in the wrong rows" in reason for reason in found["reasons"])
    assert told is (right < 0.5)
    assert f"are right in {right:.0%} of the training rows" in capsys.readouterr().out
