"""WikiText as whole articles, from files with one row a line."""

from __future__ import annotations

import re
from typing import Any

# An article opens with ` = Title = `; its sections have two equals signs and more.
_TITLE = re.compile(r" = [^=].*[^=] = \n?")


def articles(data_files: dict[str, str], **_: Any) -> Any:
    """Read lines and join them to articles, for `custom_dataset` of a task YAML.

    Args:
        data_files: JSON Lines files by split, with the column `text`.

    Returns:
        A DatasetDict with the column `page`.
    """
    from datasets import Dataset, DatasetDict, load_dataset

    splits = load_dataset("json", data_files=data_files)
    return DatasetDict(
        {name: Dataset.from_dict({"page": join(rows["text"])}) for name, rows in splits.items()}
    )


def join(lines: list[str]) -> list[str]:
    """Whole articles of the lines of a split; lines before the first title are an article, too."""
    pages: list[list[str]] = []
    blank_before = True
    for line in lines:
        begun = bool(pages) and any(before.strip() for before in pages[-1])
        if not pages or (begun and blank_before and _TITLE.fullmatch(line)):
            pages.append([])
        pages[-1].append(line)
        blank_before = not line.strip()
    return ["".join(page) for page in pages]
