"""YAML whose aliases multiply is refused wherever we read YAML, within moments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sdft_lightning.cli import main
from sdft_lightning.data.benchmarks.task_yaml import read_task_yaml
from sdft_lightning.errors import UserError
from sdft_lightning.files.texts import check_yaml

pytestmark = pytest.mark.attack


def laughs(levels: int = 12) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} [{inner}]")
    return "\n".join(lines) + "\n"


SMALL = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n"
BAD = {
    "multiplied": (laughs(), "more than 100,000 values"),
    "merged": (laughs().replace("[", "{q: [").replace("]", "]}"), "more than 100,000 values"),
    "recursive": ("a: &a\n  b: [*a]\n", "stands inside of what it names"),
    "long": ("a: " + "x" * 2**21, "characters of YAML"),
}


def test_ordinary_aliases_pass() -> None:
    check_yaml(SMALL, "f")
    check_yaml("a: [*not_an_anchor, &", "f")  # malformed: whoever loads it says so


@pytest.mark.parametrize("name", BAD)
@pytest.mark.timeout(60)
def test_a_config_a_plan_and_a_task_file_refuse_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words = BAD[name]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    for command in (["fit", f"--config={path}"], ["continual", f"--config={path}", "--dry_run"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UserError, match=words):
        read_task_yaml(path)


def test_an_option_of_the_command_line_refuses_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = laughs(8).strip().replace("\n", ", ")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model=SDFTModule", "--data.judge={" + flow + "}"])
    assert stop.value.code == 2
    assert "more than 100,000 values" in capsys.readouterr().err


def test_a_config_with_ordinary_aliases_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write_rows: Callable[..., Path]
) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(
        "model: {class_path: SFTModule}\n"
        "data: {train: &train my.jsonl, validation: *train, columns: {reference: reference}}\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={path}", "--print_config"])
    assert stop.value.code == 0
    assert "validation: my.jsonl" in capsys.readouterr().out
