"""What the tests against a real vLLM share; they skip where it is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.models.embedded import embedded_model_path

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder; without vLLM skip them."""
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(1500))  # vLLM needs a minute and more to start
            if missing:
                item.add_marker(pytest.mark.skip(reason="vllm is missing; run make test-vllm"))


@pytest.fixture(scope="session")
def fixed_ids() -> list[int]:
    """The tokens that trainer and vLLM are asked about: a chat, 41 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    text = (
        "<|im_start|>user\nWhere does the river Rhine begin?<|im_end|>\n<|im_start|>assistant\n"
        "It begins in the Swiss Alps and flows through Germany to the North Sea.<|im_end|>\n"
    )
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


@pytest.fixture(scope="session")
def trained(fixed_ids: list[int]) -> Callable[[Any], Tensor]:
    """The trainer's log-probabilities of the fixed tokens but the first."""

    @torch.no_grad()
    def score(student: Any) -> Tensor:
        ids = torch.tensor(fixed_ids)  # (L,)
        every = torch.log_softmax(student(ids.unsqueeze(0)).logits[0, :-1].float(), dim=-1)
        return every.gather(-1, ids[1:].unsqueeze(-1)).squeeze(-1)  # (L − 1,)

    return score


@pytest.fixture
def fit_embedded(fit_module: Callable[..., Any]) -> Callable[..., Any]:
    """Fit the embedded model with an engine, at a rate large enough to tell old weights from new.

    Without schedule: each step moves the weights by about 1e-4, of 0.1 that they have on average.
    """
    from sdft_lightning.modules.schedule import Schedule
    from sdft_lightning.rollout import Sampling

    def fit(engine: Any, steps: int, *callbacks: Any, **model: Any) -> Any:
        options = {
            "policy": {"name": "embedded"},
            "engine": engine,
            "sampling": Sampling(8),
            "schedule": Schedule("constant"),
            "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0),
            **model,
        }
        data = {"model_name": "embedded", "batch_size": 2}
        return fit_module(model=options, data=data, callbacks=list(callbacks), max_steps=steps)

    return fit
