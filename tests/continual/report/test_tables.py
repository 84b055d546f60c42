"""How figures and names are written in Markdown and LaTeX."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdft_lightning.continual.report import content, tables
from sdft_lightning.continual.report.tables import (
    _LATEX,
    Table,
    as_latex,
    as_markdown,
    as_text,
    fewer,
    latex_text,
    markdown_text,
    p_value,
    percent,
    points,
)

TABLE = Table("t", "50 % & more", ("Method", "%"), (("a|b_c", "−1.0"), ("[x]", "2.0 ± 1")), "<n>")


def test_markdown_takes_names_literally() -> None:
    assert as_markdown(TABLE) == (
        "| Method | % |\n| --- | ---: |\n| a\\|b\\_c | −1.0 |\n| \\[x\\] | 2.0 ± 1 |\n\n&lt;n&gt;\n"
    )
    assert markdown_text("![a](b) `c` *d* <e>") == ("\\!\\[a\\](b) \\`c\\` \\*d\\* &lt;e&gt;")


def test_latex_takes_names_literally() -> None:
    lines = as_latex(TABLE).splitlines()
    assert r"    a\textbar{}b\_c & $-$1.0 \\" in lines
    assert r"    {[}x{]} & 2.0 $\pm$ 1 \\" in lines
    assert r"  \caption{50 \% \& more. \textless{}n\textgreater{}}" in lines
    assert r"  \begin{tabular}{lr}" in lines
    hostile = Table("t", "t", ("a",), ((r"\input{x}^~#$%&",),))
    assert r"\textbackslash{}input\{x\}\textasciicircum{}\textasciitilde{}\#\$\%\& \\" in as_latex(
        hostile
    )


def test_text_aligns_figures_to_the_right() -> None:
    assert as_text(TABLE).splitlines() == ["Method        %", "a|b_c      −1.0", "[x]     2.0 ± 1"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.125, "+12.5"), (-0.3, "−30.0"), (0.0, "0.0"), (-0.0001, "0.0"), (None, "–")],
)
def test_points(value: float | None, shown: str) -> None:
    assert points(value) == shown


def test_other_figures() -> None:
    assert (percent(0.64159), percent(None)) == ("64.2", "–")
    assert [p_value(p) for p in (1.0, 0.049, 0.0042, 0.00002)] == [
        "1.00",
        "0.049",
        "0.0042",
        "< 0.0001",
    ]
    assert (fewer(3, 3), fewer(2, 3)) == ("", " (2 of 3 seeds)")


def test_latex_of_our_own_texts_needs_no_further_package() -> None:
    # Letters beyond ASCII are T1's; of other signs pdfLaTeX has to be told.
    known = {*_LATEX, "“", "”"}
    for path in (Path(tables.__file__), Path(content.__file__)):
        for text in re.findall(r'"((?:[^"\\\n]|\\.)*)"', path.read_text(encoding="utf-8")):
            odd = {sign for sign in text if ord(sign) > 127 and not sign.isalpha()}
            assert odd <= known, (path.name, text)
    assert latex_text("p ≤ 0.05") == r"p $\le$ 0.05"
