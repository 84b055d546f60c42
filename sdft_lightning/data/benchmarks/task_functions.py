"""Functions of ours that task files name: code in our sandbox, our graders, whole articles."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sdft_lightning.data.benchmarks.sandbox import CheckedProgram, SandboxLimits, run_program
from sdft_lightning.graders import get_grader
from sdft_lightning.graders.intervals import pass_at_k

# The seconds of Hugging Face's `code_eval`, which the published figures were made with.
_SECONDS = 3.0
_KS = (1, 2, 4, 8, 10, 16, 32, 64, 100, 128)


def run_answers(answers: list[list[str]], docs: list[dict[str, Any]]) -> list[list[bool]]:
    """Run all answers to all items; for `filter_fn` of a task YAML.

    The harness asks for the results of one item after the other, but filters all at once: only
    here can programs of several items run side by side, while other ranks wait.

    Args:
        answers: For each item what the model wrote behind its prompt.
        docs: The items, with the columns of openai_humaneval.

    Returns:
        For each item whether each answer passed.
    """
    programs = [
        program(doc, doc["prompt"] + answer)
        for given, doc in zip(answers, docs, strict=True)
        for answer in given
    ]
    passed = iter(passes(programs))
    return [[next(passed) for _ in given] for given in answers]


def program(doc: dict[str, Any], function: str) -> CheckedProgram:
    """A whole function with the item's own tests, which call it and cannot be changed by it."""
    return CheckedProgram(
        source=function,
        function=doc["entry_point"],
        test=f"{doc['test']}\ncheck({doc['entry_point']})",
        given=doc["prompt"],  # some tests use helpers that it defines
    )


def passes(programs: Sequence[str | CheckedProgram], at_once: int | None = None) -> list[bool]:
    """Whether each program passes.

    Args:
        programs: Python sources, with or without tests.
        at_once: How many run side by side; as many as there are cores without it.

    Returns:
        In the order of the programs.
    """
    count = at_once or len(os.sched_getaffinity(0))
    limits = SandboxLimits(seconds=_SECONDS)
    with ThreadPoolExecutor(count) as pool:
        return [outcome.passed for outcome in pool.map(lambda p: run_program(p, limits), programs)]


def results(doc: dict[str, Any], results: list[list[bool]] | list[list[str]]) -> dict[str, float]:
    """Count the answers to an item that passed; for `process_results` of a task YAML.

    Args:
        doc: The item, with the columns of openai_humaneval.
        results: One list, of what `run_answers` found; or, from a filter of your own, of whole
            functions, which are run here.

    Returns:
        pass@k, unbiased, for each usual k up to the number of answers.
    """
    found = results[0]
    unrun = [program(doc, each) for each in found if isinstance(each, str)]
    passed = sum(passes(unrun) if unrun else [bool(each) for each in found])
    return {f"pass@{k}": pass_at_k(len(found), passed, k) for k in _KS if k <= len(found)}


def contains(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether an answer contains one of the texts in the column `reference`.

    Args:
        doc: The item.
        results: The answer.

    Returns:
        `acc`, 0 or 1.
    """
    return {"acc": get_grader("contains")(results[0], doc["reference"])}


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
