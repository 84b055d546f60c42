"""The commands and links of README.md and docs/*.md: what they name is there and parses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of these --print_config shows the parsed options instead of running.
PARSED = {"fit", "validate", "test", "predict", "export", "preflight"}


def commands(page: Path) -> list[list[str]]:
    """Arguments of each `python cli.py …` in the page's bash blocks, shell variables filled in."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    variables = dict(re.findall(r'^([A-Z]+)="(.*)"$', "\n".join(lines), re.MULTILINE))
    found = []
    for line in lines:
        _, is_ours, rest = line.partition("python cli.py ")
        if not is_ours or "…" in rest:  # an ellipsis stands for the reader's own options
            continue
        for name, value in variables.items():
            rest = rest.replace(f"${name}", value)
        found.append(shlex.split(rest, comments=True))
    return found


PARSEABLE = [
    pytest.param(args, id=f"{page.stem}-{number}-{args[0]}")
    for page in PAGES
    for number, args in enumerate(commands(page))
    if args[0] in PARSED and "my.yaml" not in " ".join(args)
]


def test_readme_shows_each_command() -> None:
    shown = {args[0] for args in commands(ROOT / "README.md")}
    assert shown == PARSED | {"continual", "report"}


@pytest.mark.parametrize("args", PARSEABLE)
def test_command_parses(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdft_lightning.cli import main

    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    assert "model:" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_configs_and_links_of_a_page_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\bconfigs/[\w/]+\.yaml", text):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target
