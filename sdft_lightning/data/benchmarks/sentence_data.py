"""What IFEval needs besides its questions: NLTK's data to cut a text into sentences and words."""

from __future__ import annotations

from itertools import islice
from typing import Any

from sdft_lightning.errors import UserError

# The instructions that the harness checks with NLTK.
_CUT_UP = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
_DATA = "tokenizers/punkt_tab"


def check_sentence_data(name: str, task: Any, limit: float | None) -> None:
    """Look, before any answer is written, for the data with which it would be graded.

    The harness looks for it when the answers are there, and tries to fetch it before that without
    a word if it cannot.

    Args:
        name: The task's name.
        task: A task of the harness, with its data.
        limit: How many items are measured, or which part of them; all without it.

    Raises:
        UserError: If an item needs the data and they are not on this machine.
    """
    from lm_eval.evaluator_utils import get_sample_size

    items = islice(task.eval_docs, get_sample_size(task, limit))
    if not any(_CUT_UP & set(item.get("instruction_id_list") or ()) for item in items):
        return
    import nltk

    try:
        nltk.data.find(_DATA)
    except LookupError:
        raise UserError(
            f"data.benchmarks.tasks: {name} cuts answers into sentences with NLTK's punkt_tab, "
            "which is not on this machine and could not be fetched. Run `python -m nltk.downloader "
            "punkt_tab` where there is a network, and copy ~/nltk_data here; or leave the task out."
        ) from None
