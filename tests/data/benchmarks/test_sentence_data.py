"""IFEval without the data to grade it: told before the first answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sdft_lightning.data.benchmarks.task_yaml import check_sentence_data
from sdft_lightning.errors import UserError

TASK = SimpleNamespace(
    eval_docs=[
        {"instruction_id_list": ["keywords:existence"]},
        {"question": "No instruction at all."},
        {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"]},
    ]
)


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    def find(name: str) -> Any:
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", find)


def test_missing_data_are_named_with_the_remedy(no_data: None) -> None:
    with pytest.raises(UserError, match=r"ifeval .*-m nltk\.downloader punkt_tab"):
        check_sentence_data("ifeval", TASK, None)


@pytest.mark.parametrize("limit", [2, 0.5])
def test_items_that_are_not_measured_need_nothing(no_data: None, limit: float) -> None:
    check_sentence_data("ifeval", TASK, limit)


def test_data_that_are_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    check_sentence_data("ifeval", TASK, None)
