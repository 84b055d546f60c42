"""Working through a plan, with a stand-in for the runs: what is repeated, kept and deleted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.drive import RunFailed, Stopped, in_this_process
from sdft_lightning.continual.plan import Shard
from sdft_lightning.errors import UserError
from sdft_lightning.files import whole_files

Options = dict[str, Any]


def runs_of(records: dict[Any, Options]) -> list[str]:
    return sorted(record["run"] for record in records.values())


def without_seconds(records: dict[Any, Options]) -> dict[Any, Options]:
    return {key: {**record, "seconds": None} for key, record in records.items()}


def test_record_holds_the_agreed_fields(drive: Any, plan_options: Options, tmp_path: Path) -> None:
    assert drive(plan_options) == 0
    lines = (tmp_path / "runs/plan/results.jsonl").read_text().splitlines()
    base, first, *_ = map(json.loads, lines)
    assert len(lines) == 9
    score = len(str(tmp_path / "runs/plan/sdft/seed1/1_ferry/exported/step-4")) / 1000
    graded = {"accuracy": score, "low": score, "high": score, "n": 1, "items": {"row": score}}
    assert {**first, "plan": None, "seconds": None} == {
        "format": 1,
        "status": "finished",
        "error": None,
        "plan": None,
        "method": "sdft",
        "seed": 1,
        "stage": 1,
        "stage_name": "ferry",
        "stages": ["ferry", "museum"],
        "run": "sdft/seed1/1_ferry",
        "updates": 4,
        "tokens": 40,
        "selected_step": 4,
        "seconds": None,
        "tasks": {"ferry": graded, "museum": graded},
        "capabilities": {"general": graded},
        "drift": {"general": score},
        "curve": [{"step": 4, "task/general/accuracy": 0.5}],
    }
    assert first["seconds"]["fit"] == 2.0
    assert first["seconds"]["evaluate"] >= 0
    assert len(first["plan"]) == 64
    fields = ("method", "seed", "stage", "stage_name", "run", "updates", "tokens", "selected_step")
    assert [base[name] for name in fields] == ["base", None, 0, None, "base", 0, 0, 0]
    assert base["curve"] == []


def test_each_stage_starts_from_the_model_that_the_one_before_handed_on(
    drive: Any, plan_options: Options, tmp_path: Path, model_folder: Path
) -> None:
    drive(plan_options)
    fits = [options for command, _, options in drive.runs.calls if command == "fit"]
    names = {
        f"{Path(o['run']['root']).relative_to(tmp_path / 'runs/plan')}/{o['run']['name']}": o[
            "model"
        ]["init_args"]["policy"]["name"]
        for o in fits
    }
    for chain in ("sdft/seed1", "sft/seed1", "sdft/seed2", "sft/seed2"):
        assert names[f"{chain}/1_ferry"] == str(model_folder)
        exported = tmp_path / "runs/plan" / chain / "1_ferry/exported/step-4"
        assert names[f"{chain}/2_museum"] == str(exported)


def test_finished_runs_are_not_repeated_and_nothing_is_left_to_do(
    drive: Any, plan_options: Options
) -> None:
    drive(plan_options)
    first = drive.records(plan_options)
    calls = len(drive.runs.calls)
    assert calls == 9 + 8  # an evaluation of each, and a fit of all but the base model
    assert drive(plan_options) == 0
    assert len(drive.runs.calls) == calls
    assert drive.records(plan_options) == first


def test_more_seeds_add_to_what_is_there(drive: Any, plan_options: Options) -> None:
    drive({**plan_options, "seeds": [1]})
    before = len(drive.runs.calls)
    drive({**plan_options, "seeds": [1, 7]})
    assert len(drive.runs.calls) - before == 8
    assert len(drive.records(plan_options)) == 9


@pytest.mark.parametrize("count", [2, 3])
def test_shares_together_are_the_whole_with_the_base_model_once(
    count: int, drive: Any, plan_options: Options, tmp_path: Path
) -> None:
    drive(plan_options)
    whole_plan = drive.records(plan_options)
    parts = {**plan_options, "root": str(tmp_path / "part")}  # a name as long: scores are alike
    (tmp_path / "part").mkdir()
    bases = 0
    for number in range(1, count + 1):
        before = len(drive.runs.calls)
        drive(parts, Shard(number, count))
        bases += sum(o["run"]["name"] == "base" for _, _, o in drive.runs.calls[before:])
    assert bases == 1
    assert without_seconds(drive.records(parts)) == without_seconds(whole_plan)
    names = {path.name for path in (tmp_path / "part/plan").glob("results*")}
    assert names == {f"results-shard{i}of{count}.jsonl" for i in range(1, count + 1)}
    before = len(drive.runs.calls)
    drive(parts)  # without shares: finds what all of them have finished
    assert len(drive.runs.calls) == before


def test_failed_run_is_recorded_its_chain_ends_and_the_others_go_on(
    drive: Any, plan_options: Options, tmp_path: Path
) -> None:
    drive.runs.fail = lambda command, options: (
        command == "fit" and options["run"]["root"].endswith("sdft/seed1")
    )
    assert drive(plan_options) == 1
    records = drive.records(plan_options)
    failed = records["sdft", 1, 1]
    assert (failed["status"], failed["error"]) == ("failed", "it was meant to")
    assert ("sdft", 1, 2) not in records
    assert len(records) == 8
    assert sum(record["status"] == "finished" for record in records.values()) == 7

    drive.runs.fail = lambda command, options: False
    assert drive(plan_options) == 0
    records = drive.records(plan_options)
    assert [record["status"] for record in records.values()] == ["finished"] * 9
    assert len((tmp_path / "runs/plan/results.jsonl").read_text().splitlines()) == 10


def test_checkpoints_of_a_finished_stage_go_and_nothing_else(
    drive: Any, plan_options: Options, tmp_path: Path
) -> None:
    drive({**plan_options, "seeds": [1]})
    run = tmp_path / "runs/plan/sdft/seed1/1_ferry"
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "exported",
        "fit.json",
        "metrics.jsonl",
        "mine.txt",
        "test-0",
    }
    assert list((run / "checkpoints").iterdir()) == []
    drive({**plan_options, "keep_checkpoints": True})
    kept = tmp_path / "runs/plan/sdft/seed2/1_ferry/checkpoints/last.ckpt"
    assert kept.read_text() == "large"


def test_checkpoints_stay_while_their_stage_is_not_evaluated(
    drive: Any, plan_options: Options, tmp_path: Path
) -> None:
    drive.runs.fail = lambda command, options: (
        command == "test" and options["run"]["name"] != "base"
    )
    assert drive({**plan_options, "seeds": [1]}) == 2
    run = tmp_path / "runs/plan/sft/seed1/1_ferry"
    assert (run / "checkpoints/last.ckpt").exists()
    fits = sum(command == "fit" for command, _, _ in drive.runs.calls)
    drive.runs.fail = lambda command, options: False
    drive({**plan_options, "seeds": [1]})
    again = sum(command == "fit" for command, _, _ in drive.runs.calls) - fits
    assert again == 2  # the second stages only: a fit that is finished is not repeated


def test_fit_without_a_resume_point_starts_over_and_its_files_are_put_aside(
    drive: Any, plan_options: Options, tmp_path: Path
) -> None:
    run = tmp_path / "runs/plan/sdft/seed1/1_ferry"
    plan_options["seeds"] = [1]

    def stop(command: str, options: Options) -> bool:
        if command == "fit" and options["run"]["name"] == "1_ferry":
            run.mkdir(parents=True, exist_ok=True)
            (run / "metrics.jsonl").write_text("begun")
            raise Stopped
        return False

    drive.runs.fail = stop
    with pytest.raises(Stopped):
        drive(plan_options)
    drive.runs.fail = lambda command, options: False
    drive(plan_options)
    assert (run.parent / "1_ferry-cut" / "metrics.jsonl").read_text() == "begun"
    assert ["--ckpt_path=last"] not in [rest for _, rest, _ in drive.runs.calls]


def test_fit_with_a_resume_point_goes_on_from_it(
    drive: Any, plan_options: Options, tmp_path: Path
) -> None:
    run = tmp_path / "runs/plan/sdft/seed1/1_ferry/checkpoints"
    drive(plan_options | {"seeds": [2]})
    run.mkdir(parents=True)
    (run / "last.ckpt").write_text("large")
    before = len(drive.runs.calls)
    drive(plan_options | {"seeds": [1]})
    resumed = [
        (o["run"]["name"], rest)
        for command, rest, o in drive.runs.calls[before:]
        if rest and command == "fit"
    ]
    assert resumed == [("1_ferry", ["--ckpt_path=last"])]


def test_stop_ends_the_work_and_records_no_failure(
    drive: Any, plan_options: Options, tmp_path: Path
) -> None:
    def stop(command: str, options: Options) -> bool:
        raise Stopped

    drive.runs.fail = stop
    with pytest.raises(Stopped):
        drive(plan_options)
    assert drive.records(plan_options) == {}


def test_second_process_in_the_same_folder_is_refused(
    drive: Any, plan_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_files, "_LOCK_PAUSE", 0.0)

    def both(command: str, options: Options) -> bool:
        drive.runs.fail = lambda command, options: False
        with pytest.raises(UserError, match=r"results\.jsonl"):
            drive(plan_options)
        with pytest.raises(UserError, match="the chain base"):  # another share, the same chain
            drive(plan_options, Shard(1, 2))
        return False

    drive.runs.fail = both
    assert drive(plan_options) == 0


def test_torn_record_is_evaluated_anew(drive: Any, plan_options: Options, tmp_path: Path) -> None:
    drive(plan_options)
    whole_plan = drive.records(plan_options)
    path = tmp_path / "runs/plan/results.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    before = len(drive.runs.calls)
    drive(plan_options)
    assert [command for command, _, _ in drive.runs.calls[before:]] == ["test"]
    assert without_seconds(drive.records(plan_options)) == without_seconds(whole_plan)
    assert runs_of(whole_plan)[0] == "base"


def test_record_of_another_plan_is_refused(
    drive: Any, plan_options: Options, tmp_path: Path
) -> None:
    drive(plan_options)
    path = tmp_path / "runs/plan/results-shard1of2.jsonl"
    path.write_text('{"plan": "other", "run": "x", "method": "x", "seed": 1, "stage": 1}\n')
    with pytest.raises(UserError, match="of another plan"):
        drive(plan_options)


@pytest.mark.parametrize("code", [None, 0])
def test_command_that_exits_with_0_has_not_failed(code: int | None) -> None:
    def main() -> None:
        raise SystemExit(code)

    in_this_process(main)(["fit"])


def test_failure_tells_the_cause_behind_an_exit_code() -> None:
    def main() -> None:
        try:
            raise UserError("data.train: wrong")
        except UserError as error:
            raise SystemExit(2) from error

    with pytest.raises(RunFailed, match=r"^UserError: data\.train: wrong$"):
        in_this_process(main)(["fit"])


def test_exit_after_ctrl_c_is_a_stop_and_no_failure() -> None:
    def main() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 - as Lightning does

    with pytest.raises(Stopped):
        in_this_process(main)(["fit"])


def test_commands_see_their_own_command_line_which_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setattr(sys, "argv", ["cli.py", "continual"])
    seen: list[list[str]] = []
    in_this_process(lambda: seen.append([*sys.argv]))(["fit", "--x=1"])
    assert seen == [["cli.py", "fit", "--x=1"]]
    assert sys.argv == ["cli.py", "continual"]


# Stands in for the command line: says that it is there, saves when told to end, and exits as ours.
CHILD = """
import signal, sys, time
def save(number, frame):
    print("saved", file=sys.stderr, flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, signal.SIG_IGN if {deaf} else signal.default_int_handler)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # background or under nohup
from sdft_lightning.continual import drive as commands
commands._INTERRUPTED_ITSELF = 0.5
real = commands.subprocess.Popen
commands.subprocess.Popen = lambda args, **options: real([args[0], "-c", {child!r}], **options)
try:
    commands.in_own_process()(["fit"])
except commands.Stopped as stop:
    sys.exit(stop.code)
"""


@pytest.mark.parametrize(
    ("number", "to_all", "saves"),
    [
        (signal.SIGTERM, False, True),  # kill, timeout, a scheduler
        (signal.SIGINT, True, False),  # Ctrl-C: both get it
        (signal.SIGINT, False, True),  # kill -INT
        (signal.SIGHUP, True, False),  # the terminal is gone
        (signal.SIGHUP, False, True),  # kill -HUP
    ],
)
def test_signal_to_the_plan_ends_its_command_too_and_is_a_stop(
    number: signal.Signals, to_all: bool, saves: bool
) -> None:
    code = PARENT.format(child=CHILD.format(deaf=not to_all))
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stderr is not None
    assert parent.stderr.readline() == "ready\n"
    os.killpg(parent.pid, number) if to_all else os.kill(parent.pid, number)
    # The child holds this pipe, too: its end is the end of both.
    rest = parent.stderr.read()
    assert parent.wait(timeout=30) == 128 + number, rest
    assert ("saved" in rest) is saves
