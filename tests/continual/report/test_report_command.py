"""`report` from files to files: what it writes, prints, escapes and refuses."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.continual.report import write_report

Raw = dict[str, Any]
Write = Callable[..., Path]
EVIL = '<script>alert(1)</script> & "q" $x_1$ {{ 7*7 }} | `c` id="x" ../up'


class Page(HTMLParser):
    """Collects what the tests ask a page for."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(shared_records: list[Raw], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of complete results."""
    folder = tmp_path_factory.mktemp("complete")
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in shared_records))
    return write_report([path], folder / "report")


@pytest.fixture(scope="module")
def hostile(shared_records: list[Raw], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything wrong at once, and names that try to break out."""
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / "results.jsonl"
    evil = {"sft": EVIL, "sdft": "_hidden"}
    stages = ["front_desk", EVIL, "garden"]
    lines = []
    for record in json.loads(json.dumps(shared_records)):
        record["method"] = evil.get(record["method"], record["method"])
        record["stages"] = stages
        record["stage_name"] = stages[record["stage"] - 1] if record["stage"] else None
        record["tasks"][EVIL] = record["tasks"].pop("kitchen")
        for point in record["curve"]:
            point[f"task/{EVIL}/accuracy"] = 0.5
        lines.append(record)
    lines[4] |= {"status": "failed", "error": EVIL}
    lines.append({**lines[5], "format": 2})
    lines.append(lines[6])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    return write_report([path], folder / "report")


def page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def test_what_is_written(report: Path) -> None:
    found = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    plots = {"pareto", "matrix-1", "matrix-2"} | {
        f"curve-{number}-{name}"
        for number, name in enumerate(
            (
                "task-front-desk-accuracy",
                "task-general-accuracy",
                "drift-general",
                "task-kitchen-accuracy",
                "task-garden-accuracy",
            ),
            start=1,
        )
    }
    tables = {"summary", "points", "continual", "matrix-1", "matrix-2", "tests", "mcnemar", "runs"}
    assert {name for name in found if not name.startswith("tensorboard")} == {
        "index.html",
        "report.md",
        "report.json",
        *(f"plots/{name}.{kind}" for name in plots for kind in ("png", "svg")),
        *(f"tables/{name}.{kind}" for name in tables for kind in ("md", "tex")),
    }
    for path in report.glob("plots/*.svg"):
        ElementTree.parse(path)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in report.glob("plots/*.png"))


def test_page_is_whole_accessible_and_needs_nothing_else(report: Path) -> None:
    found = page(report)
    assert found.open == []
    assert found.all("html")[0]["lang"] == "en"
    assert found.all("script") == found.all("link") == found.all("img") == []
    text = (report / "index.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', text) == []
    assert re.findall(r"url\((?!#)", text) == []
    headers = found.all("th")
    assert headers
    assert all(header.get("scope") in ("col", "row") for header in headers)
    assert len(found.all("caption")) == len(found.all("table")) == 8
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    plots = found.all("svg")
    assert len(plots) == 6
    for plot in plots:
        assert plot["role"] == "img"
        assert set(str(plot["aria-labelledby"]).split()) <= set(ids)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    assert used <= set(ids)


def test_plots_in_the_page_take_its_colours_only(report: Path) -> None:
    text = (report / "index.html").read_text(encoding="utf-8")
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-fA-F]{6}\b", drawn) == []
    variables = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    assert {"--ink", "--muted", "--rule", "--series-1", "--series-2"} <= variables
    assert all(f"{variable}:" in text for variable in variables - {"--share"})


def test_numbers_are_the_same_everywhere(report: Path) -> None:
    numbers = json.loads((report / "report.json").read_text())
    sdft = next(each for each in numbers["methods"] if each["label"] == "sdft")
    value = sdft["new"]["estimate"]["value"]
    shown = f"{100 * value:.1f} [{100 * sdft['new']['estimate']['low']:.1f}, "
    markdown = (report / "report.md").read_text()
    assert shown.replace("[", "\\[") in markdown
    assert shown.replace("[", "{[}") in (report / "tables" / "summary.tex").read_text()
    assert shown in "".join(page(report).texts)
    first = numbers["tests"][0]
    assert (first["first"], first["second"], first["items"]) == ("sdft", "base", 40)


def test_complete_results_say_so(report: Path) -> None:
    text = "".join(page(report).texts)
    assert "Every method has a result of every stage with every seed." in text
    assert "What is missing or odd" not in text
    assert "Every method has a result of every stage" in (report / "report.md").read_text()


def test_names_and_errors_of_users_are_only_text(hostile: Path) -> None:
    found = page(hostile)
    assert found.open == []
    assert found.all("script") == []
    text = "".join(found.texts)
    assert EVIL in text
    assert f"failed: {EVIL}" in text
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "<script" not in (hostile / "report.md").read_text()
    for path in hostile.glob("plots/*.svg"):
        ElementTree.parse(path)
    inside = {path.resolve() for path in hostile.parent.rglob("*")}
    assert all(hostile.parent.resolve() in path.parents for path in inside)


def test_everything_that_is_wrong_stands_in_page_markdown_and_numbers(hostile: Path) -> None:
    kinds = ["unknown format", "torn line", "failed run", "duplicates"]
    text = "".join(page(hostile).texts)
    markdown = (hostile / "report.md").read_text()
    numbers = json.loads((hostile / "report.json").read_text())
    assert sorted(problem["kind"] for problem in numbers["problems"]) == sorted(kinds)
    for kind in kinds:
        assert kind in text
        assert f"**{kind}**" in markdown
    assert "Every method has" not in text
    assert "2 of 3" in text


def test_console_names_problems_and_where_the_report_is(
    records: list[Raw], write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_report([write(records[:-1])], tmp_path / "out")
    printed = capsys.readouterr().out
    assert "WARNING: missing run: sft, seed 44: no result of stage 3 (garden)" in printed
    assert re.search(r"^sft +2 of 3 ", printed, flags=re.MULTILINE)
    assert f"Report: {folder / 'index.html'}" in printed
    assert "Every method has" not in printed


def test_nothing_is_written_over(by_hand: list[Raw], write: Write, tmp_path: Path) -> None:
    path = write(by_hand)
    out = tmp_path / "out"
    out.mkdir()
    assert write_report([path], out) == out  # empty: nothing to lose
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert write_report([path], out) == tmp_path / "out-1"
    assert write_report([path], out) == tmp_path / "out-2"
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("keep", [1, 2])
def test_base_alone_and_a_first_stage_alone_make_a_report(
    keep: int, by_hand: list[Raw], write: Write, tmp_path: Path
) -> None:
    folder = write_report([write(by_hand[:keep])], tmp_path / "out")
    text = "".join(page(folder).texts)
    assert "There is no plot of new tasks" not in text  # the base has both
    assert "Nothing could be tested" in text
    assert ("missing run" in text) == (keep == 2)


def test_more_methods_than_colours(write: Write, by_hand: list[Raw], tmp_path: Path) -> None:
    found = [by_hand[0]]
    for number in range(10):
        found += [{**record, "method": f"m{number}"} for record in by_hand[1:]]
    text = (write_report([write(found)], tmp_path / "out") / "index.html").read_text()
    legend = re.search(r'<ul class="legend".*?</ul>', text, flags=re.DOTALL)
    assert legend is not None
    glyphs = re.findall(r'class="glyph ([^"]+)" aria-hidden="true">(.)<', legend.group())
    assert len(glyphs) == len(set(glyphs)) == 11
