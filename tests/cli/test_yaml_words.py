"""Values that YAML takes for something else arrive as they are documented."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft_lightning.data.benchmarks import Benchmarks
from sdft_lightning.errors import UserError

RunCli = Callable[..., None]
PACKAGE = Path(__file__).parents[2] / "sdft_lightning"
# Words that YAML takes for another value, and the test that they arrive.
HANDLED = {"off": "test_mean_off_turns_the_mean_off"}


def literal_texts() -> Iterator[str]:
    """All texts that an option may be one of."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
                for part in ast.walk(node.slice):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value


def test_every_word_that_yaml_takes_for_another_value_is_handled() -> None:
    texts = set(literal_texts())
    assert {"cosine", "none", "nf4"} <= texts
    odd = {text for text in texts if yaml.safe_load(text) != text}
    assert odd == set(HANDLED)
    assert all(test in globals() for test in HANDLED.values())


@pytest.mark.parametrize(
    ("text", "in_file"),
    [*((text, True) for text in ("off", "Off", "'off'", "false", "no")), ("off", False)],
)
def test_mean_off_turns_the_mean_off(
    text: str, in_file: bool, run_cli: RunCli, fit_args: list[str], tmp_path: Path, capsys: Any
) -> None:
    given = f"--data.benchmarks.mean={text}"
    if in_file:
        (tmp_path / "mean.yaml").write_text(f"data: {{benchmarks: {{mean: {text}}}}}\n")
        given = "--config=mean.yaml"
    with pytest.raises(SystemExit) as stop:
        run_cli(*fit_args, given, "--print_config")
    assert stop.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)["data"]["benchmarks"]["mean"]
    assert Benchmarks(mean=parsed).mean == "off"


def test_mean_on_is_refused_in_a_sentence(
    run_cli: RunCli, fit_args: list[str], capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(*fit_args, "--data.benchmarks.mean=on")
    assert stop.value.code == 2
    assert "mean" in capsys.readouterr().err
    wrong: Any = True
    with pytest.raises(UserError, match=r"data\.benchmarks\.mean: got True, allowed are alike"):
        Benchmarks(mean=wrong)


@pytest.mark.parametrize("word", ["off", "no", "1", "1e3", "null", "2024-01-01"])
@pytest.mark.parametrize("option", ["run.name", "data.name", "data.columns.prompt"])
def test_word_of_yaml_is_a_text_where_the_command_line_wants_one(
    word: str, option: str, run_cli: RunCli, fit_args: list[str], capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(*fit_args, f"--{option}={word}", "--print_config")
    shown = capsys.readouterr()
    assert stop.value.code == 0, shown.err
    value = yaml.safe_load(shown.out)
    for part in option.split("."):
        value = value[part]
    assert json.dumps(value) == json.dumps(word)
