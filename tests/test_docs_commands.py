"""The commands and links of README.md and docs/*.md: what they name is there and parses."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of these --print_config shows the parsed options instead of running.
PARSED = {"fit", "validate", "test", "predict", "export", "preflight"}


def commands(page: Path) -> list[list[str]]:
    """Arguments of each `sdft …` in the page's bash blocks, shell variables filled in."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    variables = dict(re.findall(r'^([A-Z]+)="(.*)"$', "\n".join(lines), re.MULTILINE))
    found = []
    for line in lines:
        before, is_ours, rest = line.partition("sdft ")
        if before or not is_ours or "…" in rest:  # an ellipsis stands for the reader's own options
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


def told() -> list[Path]:
    """Every page, config, notebook and script that tells somebody what to type."""
    kinds = ("docs/*.md", "configs/**/*.yaml", "notebooks/*.ipynb", "scripts/*", "*.md")
    found = [path for kind in kinds for path in ROOT.glob(kind) if path.is_file()]
    return [path for path in found if path.name != "CHANGELOG.md"]


def test_the_command_has_one_name_and_the_other_is_named_once() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in told()}
    older = [path for path, text in texts.items() if re.search(r"\bcli\.py\b", text)]
    assert {path.name for path in older} == {"README.md"}
    assert texts[ROOT / "README.md"].count("cli.py") == 1
    assert sum(text.count("sdft fit") for text in texts.values()) > 10


def test_no_page_installs_the_package_from_an_index_that_does_not_have_it() -> None:
    code = (*(ROOT / "sdft_lightning").rglob("*.py"), *(ROOT / "tests" / "perf").glob("*.py"))
    for path in (*told(), *code):
        found = re.findall(
            r"pip install[^\n]*?['\" ](sdft[-_]lightning[\w.\[-]*)",
            path.read_text(encoding="utf-8"),
        )
        assert [name for name in found if ".whl" not in name] == [], path


def printed_texts(path: Path) -> Iterator[str]:
    """The texts of a module but for its own docstring: messages, and the help of options."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = ast.get_docstring(tree, clean=False)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != own:
            yield node.value


IN_A_CLONE = re.compile(r"(?<![\w./])(configs|docs|notebooks|scripts|tests)/\w+")


def test_no_message_and_no_preset_names_a_file_that_only_a_clone_has() -> None:
    package = sorted((ROOT / "sdft_lightning").rglob("*.py"))
    assert len(package) > 100
    found = [
        f"{path.name}: {text[:200]}"
        for path in package
        for text in printed_texts(path)
        if IN_A_CLONE.search(text)
    ]
    assert found == []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8").replace("!function", ""))
        assert not IN_A_CLONE.search(str(values)), path


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
