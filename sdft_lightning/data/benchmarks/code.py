"""HumanEval with our sandbox in the place of `code_eval`, which runs code without limits."""

from __future__ import annotations

from typing import Any

from sdft_lightning.graders.pass_at_k import pass_at_k
from sdft_lightning.sandbox import SandboxLimits, run_program

# The seconds of Hugging Face's `code_eval`, which the published figures were made with.
_LIMITS = SandboxLimits(seconds=3.0)
_KS = (1, 2, 4, 8, 10, 16, 32, 64, 100, 128)


def all_answers(answers: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Keep all answers to each item, as whole functions; for `filter_fn` of a task YAML."""
    return [
        [doc["prompt"] + answer for answer in given]
        for given, doc in zip(answers, docs, strict=True)
    ]


def program(doc: dict[str, Any], function: str) -> str:
    """A whole function with the item's own tests behind it."""
    return f"{function}\n{doc['test']}\ncheck({doc['entry_point']})"


def results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """Run the answers to an item; for `process_results` of a task YAML.

    Args:
        doc: The item, with the columns of openai_humaneval.
        results: One list of whole functions.

    Returns:
        pass@k, unbiased, for each usual k up to the number of answers.
    """
    functions = results[0]
    passed = sum(run_program(program(doc, each), _LIMITS).passed for each in functions)
    count = len(functions)
    return {f"pass@{k}": pass_at_k(count, passed, k) for k in _KS if k <= count}
