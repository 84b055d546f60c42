"""`make gpu` on a CPU: every part runs, a bad end of one is told and ends no other."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
# Says why it is left out, without a GPU and what else is optional.
OPTIONAL = {"tests", "trl"}


class Done(NamedTuple):
    """A run of the script."""

    code: int
    output: str
    lines: dict[str, dict[str, Any]]
    file: Path

    def figures(self, part: str) -> list[dict[str, Any]]:
        """What a part found."""
        found: list[dict[str, Any]] = self.lines[part]["figures"]
        return found


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def gpu_check() -> Any:
    return importlib.import_module("gpu_check")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Every part on tiny shapes: about 40 s of a core, most of it imports."""
    file = tmp_path_factory.mktemp("gpu") / "new" / "lines.jsonl"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--device=cpu", "--small"]
    ran = subprocess.run(
        [*command, "--patience=10", f"--out={file}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return Done(
        ran.returncode, ran.stdout + ran.stderr, {each["part"]: each for each in lines}, file
    )


@pytest.mark.timeout(1500)  # under a minute, or many on a busy machine
def test_every_part_runs_on_a_cpu(done: Done, gpu_check: Any) -> None:
    assert done.code == 0, done.output
    assert list(done.lines) == [part.name for part in gpu_check.PARTS]
    for name, line in done.lines.items():
        assert line["status"] in (("ok", "skipped") if name in OPTIONAL else ("ok",)), line
        assert bool(line["why"]) == (line["status"] == "skipped")
        assert line["figures"] or line["status"] == "skipped"
        assert f"| {name} | {line['status']} |" in done.output


@pytest.mark.timeout(1500)
def test_what_parts_find_on_a_cpu(done: Done) -> None:
    steps = done.figures("steps")
    assert len(steps) == 3
    assert all(each["apart"] < 1e-3 for each in steps)
    assert abs(steps[2]["loss"] - steps[0]["loss"]) > 0.1  # a step that was not taken would show
    ways = {each["what"]: each for each in done.figures("gradients")}
    assert list(ways) == ["auto", "same", "LoRA", "LowMemoryAdamW"]
    assert all(0 < each["first_micro_batch"] < each["both"] for each in ways.values())
    for figure in done.figures("token"):
        assert figure["milliseconds"] > 0
        assert figure["launches"] > 10
    values = {each["value"] for each in done.figures("loss")}
    assert len(values) == 1
    assert len(done.figures("loss")) == 3
    reasons = [each.get("left_out", "") for each in done.figures("attention")]
    assert [bool(reason) for reason in reasons] == [False, False, True] * 2
    phases = {each["what"]: each for each in done.figures("whole_step")}
    for phase in ("rollout", "teacher", "divergence", "backward", "optimizer"):
        assert phases[phase]["planned_gigabytes"] > 0
        assert phases[phase]["peak_gigabytes"] > 0
    folder, stream = done.figures("hand_over")[:2]
    for handed in (folder, stream):
        assert handed["seconds"] > 0
        assert handed["gigabytes"] == folder["gigabytes"] > 0


@pytest.mark.timeout(1500)
def test_a_file_is_never_written_over(
    done: Done, gpu_check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = done.file.read_bytes()
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--device=cpu", "--small", "--parts=machine", f"--out={done.file}"])
    assert stop.value.code == 2
    assert "name a file that is not there" in capsys.readouterr().err
    assert done.file.read_bytes() == before


def test_an_unknown_part_is_refused_with_the_known_ones(
    gpu_check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--parts=machine,speed"])
    assert stop.value.code == 2
    assert "no part speed; there are machine, steps" in capsys.readouterr().err


def test_all_parts_together_take_ten_minutes_at_most(gpu_check: Any) -> None:
    assert sum(part.seconds for part in gpu_check.PARTS) <= gpu_check.TOTAL == 600


FAKE = """
import os, subprocess, time
from gpu_common import SkippedError, WrongError

def good(setting):
    setting.figure("all", number=1.23456789, size=float("nan"))

def crashes(setting):
    setting.figure("before", number=1)
    os.kill(os.getpid(), 9)

def hangs(setting):
    setting.figure("child", process=subprocess.Popen(["sleep", "60"]).pid)
    time.sleep(60)

def wrong(setting):
    raise WrongError("7 is not 8")

def left_out(setting):
    raise SkippedError("no such package")

def raises(setting):
    print("what it said")
    raise MemoryError("large")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its parts")
@pytest.mark.parametrize(
    ("name", "status", "why"),
    [
        ("good", "ok", ""),
        ("crashes", "failed", "its process ended with code -9"),
        ("hangs", "failed", "ended after 2 s, the time that it has"),
        ("wrong", "failed", "7 is not 8"),
        ("left_out", "skipped", "no such package"),
        ("raises", "failed", "MemoryError('large')"),
    ],
)
def test_a_bad_end_of_a_part_is_told(
    name: str,
    status: str,
    why: str,
    gpu_check: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "fake_parts.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    part = gpu_check.Part(name, "fake_parts", 2, "")
    found = gpu_check.run_part(part, "cpu", True, 2.0, multiprocessing.get_context("fork"))
    assert (found.part, found.status) == (name, status)
    assert found.why.startswith(why)
    printed = capfd.readouterr()
    assert "what it said" not in printed.out
    if name == "good":
        assert found.figures == [{"what": "all", "number": 1.2346, "size": None}]
    if name == "raises":
        assert "what it said" in printed.err
    if name == "crashes":
        assert found.figures == [{"what": "before", "number": 1}]
    if name == "hangs":  # what it has started is ended, too
        state = Path(f"/proc/{found.figures[0]['process']}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"
    assert f"| {name} | {status} |" in gpu_check.table([found])


def test_a_failed_part_is_the_exit_code(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(part: Any, *given: Any) -> Any:
        return gpu_check.Outcome(part.name, kinds[part.name], 1.0, "so", [])

    monkeypatch.setattr(gpu_check, "run_part", ended)
    monkeypatch.setattr(gpu_check, "process_context", lambda device: None)
    kinds = {"machine": "ok", "trl": "skipped"}
    assert gpu_check.main(["--parts=machine,trl"]) == 0
    kinds = {"machine": "failed", "trl": "ok"}
    assert gpu_check.main(["--parts=machine,trl"]) == 1
    assert '"part": "trl", "status": "ok"' in capsys.readouterr().out  # the others go on


def test_steps_that_differ_from_the_recorded_ones_fail() -> None:
    runs, common = importlib.import_module("gpu_runs"), importlib.import_module("gpu_common")
    setting = common.Setting("cpu", True, lambda figure: None)
    recorded = [(2.0, 4.0), (1.0, 4.0)]
    runs.compare_steps(setting, "tiny", [(2.001, 4.0), (1.0, 3.99)], recorded)
    with pytest.raises(common.WrongError, match=r"differ from those of a CPU by 2\.0%"):
        runs.compare_steps(setting, "tiny", [(2.0, 4.0), (1.02, 4.0)], recorded)
    with pytest.raises(common.WrongError, match="1 steps were logged"):
        runs.compare_steps(setting, "tiny", recorded[:1], recorded)


def test_a_weight_without_its_gradient_is_found() -> None:
    class Module(NamedTuple):
        student: nn.Module

    watch = importlib.import_module("gpu_runs").GradientWatch()
    module = Module(nn.ModuleDict({"a": nn.Linear(2, 2), "lora_A": nn.Linear(2, 2)}))
    weight, bias = module.student["a"].parameters()  # type: ignore[index]
    weight.grad, bias.grad = torch.ones(2, 2), torch.ones(2)
    watch.on_after_backward(None, module)
    assert watch.faults == []
    weight.grad, bias.grad = 2 * torch.ones(2, 2), None
    watch.on_after_backward(None, module)
    assert watch.faults == ["micro-batch 2: 1 of 2 weights without gradient, e.g. a.bias"]
    watch.on_after_backward(None, module)
    assert "2 of 2 weights that got nothing more" in watch.faults[-1]
