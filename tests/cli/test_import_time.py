"""What is imported before it is needed: nothing that takes seconds."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest

import sdft_lightning
from sdft_lightning.cli.entry import check_trainer_names, trainer_names, with_presets
from sdft_lightning.errors import UserError

ROOT = Path(__file__).parents[2]
# Each takes from half a second to several.
SLOW = ("torch", "transformers", "lightning", "numpy", "matplotlib", "scipy", "lm_eval", "datasets")
# Few commands use them. Lightning brings parts of scipy and matplotlib (torchmetrics).
USED_LATE = ("lm_eval", "requests", "datasets", "pyarrow", "peft", "openai", "scipy", "matplotlib")
TELL = "; import sys; print('loaded:', *[each for each in {names!r} if each in sys.modules])"


def run_python(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python of its own, which has imported nothing."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def loaded(code: str, names: tuple[str, ...] = SLOW) -> list[str]:
    """Which of the libraries some code has imported."""
    done = run_python("-c", code + TELL.format(names=names))
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("loaded:")
    return last.split()[1:]


def imported(code: str) -> set[str]:
    """All modules that some code has imported."""
    done = run_python("-c", code + "; import sys; print(*sys.modules, sep='\\n')")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


def ran_light(words: list[str], cwd: Path) -> tuple[int, str]:
    """A command that is answered without a slow library: its exit code, and what it prints."""
    code = (
        "import sys, sdft_lightning.cli as cli\n"
        f"try:\n    cli.main({words!r})\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        f"slow = [each for each in {SLOW!r} if each in sys.modules]\n"
        "assert not slow, slow\n"
        "sys.exit(code)"
    )
    done = run_python("-c", code, cwd=cwd)
    assert "AssertionError" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_package_and_its_command_line_import_nothing_slow() -> None:
    assert loaded("import torch") == ["torch", "numpy"]  # so it would be seen
    assert loaded("import sdft_lightning") == []
    assert loaded("import sdft_lightning.cli") == []
    assert loaded("from sdft_lightning import UserError, main") == []


def test_help_lists_all_commands(tmp_path: Path) -> None:
    code, printed = ran_light(["--help"], tmp_path)
    assert code == 0
    commands = printed.partition("commands:")[2]
    for name in "fit validate test predict preflight export continual report demo".split():
        assert f"\n    {name} " in commands


PROGRAMS = {
    "all": (["--help"], "usage: sdft [-h]"),
    "version": (["--version"], f"sdft {sdft_lightning.__version__}\n"),
    "continual": (["continual", "--help"], "usage: sdft continual [-h]"),
    "report": (["report", "--help"], "usage: sdft report [-h]"),
    "demo": (["demo", "--help"], "usage: sdft demo [-h]"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_help_and_version_name_the_program_and_import_nothing_slow(
    case: str, tmp_path: Path
) -> None:
    words, begin = PROGRAMS[case]
    code, printed = ran_light(words, tmp_path)
    assert code == 0
    assert printed.startswith(begin)


def test_presets_are_found_wherever_a_config_may_stand_and_other_words_stay() -> None:
    quickstart, sft = (
        str(ROOT / "configs" / f"{name}.yaml") for name in ("quickstart", "model/sft")
    )
    words = ["fit", "--config", "preset:quickstart", "-c=preset:model/sft.yaml"]
    assert with_presets(words) == ["fit", "--config", quickstart, f"-c={sft}"]
    same = [
        "fit",
        "--config",
        "a//b.yaml",
        "--config={a: //b}",
        "--run.name=preset:quickstart",
        "-c",
    ]
    assert with_presets(same) == same
    for name in ("preset:none", "preset:../cli", "preset:", "preset:/etc/passwd"):
        with pytest.raises(UserError, match=r"ships no .* It ships .*quickstart"):
            with_presets(["fit", f"--config={name}"])


WRONG = {
    "no_command": ([], "no command was given. Name one of fit, "),
    "unknown_command": (["fitt"], "there is no command 'fitt'. Name one of fit, "),
    "option_before_the_command": (["--trainer.foo=1"], "unrecognized arguments: --trainer.foo=1"),
    "option_of_no_trainer": (["fit", "--trainer.foo=1"], "unrecognized arguments: --trainer.foo=1"),
    "broken_yaml": (["fit", "--config=broken.yaml"], "broken.yaml, line 2 is no YAML"),
    "no_preset": (["continual", "--config=preset:nix"], "this package ships no 'preset:nix'"),
    "name_twice": (["fit", "--config", "twice.yaml"], "twice.yaml, line 2: seed stands twice"),
    "plan_that_is_not_there": (["continual", "--config=nix.yaml"], "there is no file nix.yaml"),
    "option_of_no_plan": (["continual", "--config=plan.yaml", "--foo=1"], "foo"),
    "results_that_are_not_there": (["report", "nix.jsonl"], "there is no file nix.jsonl"),
    "option_of_no_report": (["report", "nix.jsonl", "--foo"], "unrecognized arguments: --foo"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_command_is_answered_without_a_slow_import(case: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("trainer:\n\tmax_steps: 1\n")
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "plan.yaml").write_text("name: x\n")
    words, message = WRONG[case]
    code, printed = ran_light(words, tmp_path)
    assert code == 2
    assert message in printed
    assert "Traceback" not in printed


def test_names_of_the_trainer_are_those_of_its_signature() -> None:
    assert trainer_names() == set(inspect.signature(L.Trainer).parameters)
    check_trainer_names(
        [
            "--trainer.callbacks+=X",
            "--trainer.callbacks.a=1",
            "--trainer.devices",
            "2",
            "--trainer={}",
        ]
    )
    check_trainer_names(["--trainer.foo=1", "--help"])
    with pytest.raises(UserError, match=r"--trainer.foo --trainer.bar.a=1\. The trainer has no"):
        check_trainer_names(["--trainer.foo", "1", "--trainer.bar.a=1", "--trainer.devices=1"])


def test_commands_import_late_what_few_of_them_use() -> None:
    theirs = imported("import lightning.pytorch.cli")
    ours = imported("import sdft_lightning.cli.command") - theirs
    assert "sdft_lightning.modules.sdft" in ours
    assert {name for name in ours if name.partition(".")[0] in USED_LATE} == set()
    models = {name for name in ours if name.startswith("transformers.models.")}
    assert {name for name in models if ".modeling_" in name} == set()


def declared() -> dict[str, str]:
    """Names and modules that a type checker reads in the package's `__init__`."""
    tree = ast.parse((ROOT / "sdft_lightning" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in found for alias in node.names}


def test_names_for_scripts_are_those_that_a_type_checker_sees() -> None:
    from importlib import import_module

    places = declared()
    assert sorted(places) == sorted(sdft_lightning.__all__)
    assert set(places) <= set(dir(sdft_lightning))
    for name, module in places.items():
        assert getattr(sdft_lightning, name) is getattr(import_module(module), name), name
    with pytest.raises(AttributeError, match="no attribute 'SDFTModul'"):
        _ = sdft_lightning.SDFTModul
