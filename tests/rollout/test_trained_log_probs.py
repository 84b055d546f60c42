"""The trainer's own log-probabilities of sampled tokens."""

from __future__ import annotations

import math

import pytest
import torch

from sdft_lightning.rollout import Sampling, trained_log_probs
from sdft_lightning.types import OutputHead

# One hidden dimension: the logits of a state h are h times these, probabilities 0.5, 0.3, 0.2.
HEAD = OutputHead(torch.tensor([[0.5], [0.3], [0.2]]).log(), None, 1.0, None)
HIDDEN = torch.ones(3, 1)
TOKENS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("sampling", "truncated", "expected"),
    [
        (Sampling(), True, [0.5, 0.3, 0.2]),
        # At temperature 1/2 probabilities are squared: 0.25, 0.09, 0.04 of 0.38.
        (Sampling(temperature=0.5), True, [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        (Sampling(top_k=2), False, [0.5, 0.3, 0.2]),
        # Tokens 0 and 1 are kept; token 2, sampled across an edge, counts as kept.
        (Sampling(top_k=2), True, [0.5 / 0.8, 0.3 / 0.8, 0.2]),
        (Sampling(top_p=0.6), True, [0.5 / 0.8, 0.3 / 0.8, 0.2]),
        (Sampling(min_p=0.5), True, [0.5 / 0.8, 0.3 / 0.8, 0.2]),
    ],
)
def test_log_probs_by_hand_at_temperature_and_truncation(
    sampling: Sampling, truncated: bool, expected: list[float]
) -> None:
    for chunk in (3, 6, 100):  # one, two and all tokens at a time
        found = trained_log_probs(HIDDEN, HEAD, TOKENS, sampling, truncated, chunk)
        assert found.tolist() == pytest.approx([math.log(p) for p in expected], rel=1e-5)


def test_no_token_gives_no_value() -> None:
    found = trained_log_probs(HIDDEN[:0], HEAD, TOKENS[:0], Sampling(), True)
    assert found.shape == (0,)
