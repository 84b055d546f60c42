"""Tables as text, Markdown and LaTeX, and how their figures are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sdft_lightning.continual.report.summary import Estimate, Mean

NOTHING = "–"


class Table(NamedTuple):
    """A table of texts; the first column names the rows.

    Attributes:
        key: Name of its files.
        title: What it shows.
        header: Names of the columns.
        rows: Cells.
        note: How to read it.
        text_columns: Number of leading columns that hold words and are set to the left.
        heat: Where cells are shaded: a share in [0, 1] or None, of the shape of `rows`.
    """

    key: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: int = 1
    heat: tuple[tuple[float | None, ...], ...] | None = None


def percent(value: float | None) -> str:
    """A share in per cent, without the sign."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    if value is None:
        return NOTHING
    rounded = round(100 * value, 1)
    return "0.0" if rounded == 0 else f"{rounded:+.1f}".replace("-", "−")


def nats(value: float | None) -> str:
    """A difference of log-likelihoods, with its sign."""
    return NOTHING if value is None else f"{value:+.2f} nats".replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """An interval of shares in per cent."""
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def estimate(value: Estimate | None) -> str:
    """A share with its interval, in per cent."""
    if value is None:
        return NOTHING
    return f"{percent(value.value)} {interval(value.low, value.high)}".rstrip()


def mean(value: Mean | None, expected: int) -> str:
    """A mean with its interval; says so where it is over fewer seeds than it should be."""
    if value is None:
        return NOTHING
    return estimate(value.estimate) + fewer(value.seeds, expected)


def fewer(seeds: int, expected: int) -> str:
    """A remark where a mean is over fewer seeds than it should be."""
    return f" ({seeds} of {expected} seeds)" if seeds < expected else ""


def seed_count(seeds: int, expected: int) -> str:
    """The number of seeds, and of how many."""
    return str(seeds) if seeds == expected else f"{seeds} of {expected}"


def p_value(p: float) -> str:
    """A p value, finer near the limits that are asked for, or an upper bound."""
    if p < 0.0001:
        return "< 0.0001"
    return f"{p:.4f}" if p < 0.01 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def as_text(table: Table) -> str:
    """The table for a terminal."""
    cells = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < table.text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def as_markdown(table: Table) -> str:
    """The table in Markdown, without its title."""
    marks = ["---" if i < table.text_columns else "---:" for i in range(len(table.header))]
    lines = [[markdown_text(cell) for cell in row] for row in (table.header, *table.rows)]
    lines.insert(1, marks)
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{body}\n\n{markdown_text(table.note)}\n" if table.note else f"{body}\n"


def markdown_text(text: str) -> str:
    """Text in which nothing is taken for Markdown or HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#~$!])", r"\\\1", text)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
}


def latex_text(text: str) -> str:
    """Text in which nothing is taken for a command."""
    escaped = "".join(_LATEX.get(sign, sign) for sign in text)
    # A row that begins with [ would be read as the length after \\.
    return escaped.replace("[", "{[}").replace("]", "{]}")


def as_latex(table: Table) -> str:
    """The table in LaTeX; needs the packages booktabs and, for |, < and quotes, fontenc T1."""
    columns = "".join("l" if i < table.text_columns else "r" for i in range(len(table.header)))

    def row(cells: Sequence[str]) -> str:
        return " & ".join(latex_text(cell) for cell in cells) + r" \\"

    caption = latex_text(f"{table.title}. {table.note}".strip())
    return "\n".join(
        [
            "% \\usepackage[T1]{fontenc}, \\usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption}}}",
            rf"  \label{{tab:{table.key}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            f"    {row(table.header)}",
            r"    \midrule",
            *(f"    {row(cells)}" for cells in table.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )
