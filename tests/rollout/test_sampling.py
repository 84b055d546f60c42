"""From logits to tokens: truncation and inverse CDF by hand, and frequencies of many draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.rollout.sampling import Sampling, choose_tokens, inverse_cdf, truncate_probs

PROBS = [0.15, 0.5, 0.1, 0.25]  # not in order
ALMOST_ONE = math.nextafter(1.0, 0.0)


def token(probs: list[float], uniform: float) -> int:
    numbers = torch.tensor([uniform], dtype=torch.float64)
    return int(inverse_cdf(torch.tensor([probs]), numbers))


def kept(probs: list[float] | None = None, **options: Any) -> list[int]:
    """Ids of the tokens that stay."""
    values = torch.tensor([probs or PROBS])
    result = truncate_probs(values, Sampling(**options))
    assert torch.equal(result[result > 0], values[result > 0])  # not renormalised
    return result[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [(0.0, 0), (0.2499, 0), (0.25, 2), (0.5, 2), (0.7499, 2), (0.75, 3), (ALMOST_ONE, 3)],
)
def test_inverse_cdf_by_hand_passes_over_a_token_without_probability(
    uniform: float, expected: int
) -> None:
    assert token([0.25, 0.0, 0.5, 0.25], uniform) == expected


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, ALMOST_ONE, 1.0])
def test_never_a_token_of_probability_zero_at_either_end(uniform: float) -> None:
    assert token([0.0, 0.0, 0.3, 0.7, 0.0, 0.0], uniform) in (2, 3)
    assert token([0.0, 0.0, 1e-30, 0.0], uniform) == 2


def test_probabilities_need_not_be_normalised() -> None:
    assert [token([0.0, 2.0, 6.0, 0.0], u) for u in (0.0, 0.24, 0.26, 0.99)] == [1, 1, 2, 2]


def test_every_row_has_its_own_number() -> None:
    probs = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.1, 0.9]])
    numbers = torch.tensor([0.1, 0.6, 0.2], dtype=torch.float64)
    assert inverse_cdf(probs, numbers).tolist() == [0, 1, 1]


def test_rare_tokens_of_a_large_vocabulary_can_each_be_chosen() -> None:
    # Near 1 float32 moves in steps of 6e-8: of six such neighbours five would never be sampled.
    probs = torch.full((1, 200_001), 1e-8)
    probs[0, 0] = 1 - 200_000 * 1e-8
    cumulative = probs[0].double().cumsum(0)
    wanted = torch.arange(100_000, 100_020)
    middles = (cumulative[wanted] + cumulative[wanted - 1]) / 2 / cumulative[-1]
    assert inverse_cdf(probs.expand(20, -1), middles).tolist() == wanted.tolist()


@pytest.mark.parametrize("size", [255, 256, 257, 1000])
def test_blocks_of_tokens_choose_what_one_sum_over_all_chooses(size: int) -> None:
    random = torch.Generator().manual_seed(0)
    probs = torch.rand(400, size, generator=random) ** 8
    probs[torch.rand(400, size, generator=random) < 0.3] = 0.0
    probs[::7, : size // 2] = 0.0  # whole blocks without mass
    probs[::11, 2 * size // 3 :] = 0.0
    uniforms = torch.rand(400, dtype=torch.float64, generator=random)
    uniforms[:20], uniforms[20:40] = 0.0, ALMOST_ONE
    sums = probs.double().cumsum(dim=-1)
    target = uniforms.unsqueeze(-1) * sums[:, -1:]
    expected = (sums <= target).sum(dim=-1)
    found = inverse_cdf(probs, uniforms)
    ends = uniforms == ALMOST_ONE  # there one sum may step over the end, by rounding
    assert torch.equal(found[~ends], expected[~ends])
    assert (probs.gather(1, found.unsqueeze(1)) > 0).all()
    assert (probs[ends].flip(1) > 0).long().argmax(dim=1).eq(size - 1 - found[ends]).all()


def test_top_k_by_hand() -> None:
    assert kept(top_k=1) == [1]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=0) == kept(top_k=4) == kept(top_k=99) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1e-6, [1]), (0.49, [1]), (0.5, [1]), (0.51, [1, 3]), (0.76, [0, 1, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_token_that_reaches_it(top_p: float, expected: list[int]) -> None:
    assert kept(top_p=top_p) == expected


def test_min_p_is_a_fraction_of_the_likeliest() -> None:
    assert kept(min_p=0.6) == [1]
    assert kept(min_p=0.49) == [1, 3]
    assert kept(min_p=0.29) == [0, 1, 3]
    assert kept(min_p=0.0) == [0, 1, 2, 3]


def test_combined_the_tightest_decides() -> None:
    assert kept(top_k=3, top_p=0.6, min_p=0.1) == [1, 3]
    assert kept(top_k=2, top_p=0.99, min_p=0.1) == [1, 3]
    assert kept(top_k=3, top_p=0.99, min_p=0.45) == [1, 3]
    # Each looks at the whole distribution: of the two that top-k leaves, 0.5 is 67 %, not 50 %.
    assert kept(top_k=2, top_p=0.6) == [1, 3]


def test_each_row_is_truncated_for_itself() -> None:
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
    assert truncate_probs(probs, Sampling(top_k=1)).nonzero().tolist() == [[0, 0], [1, 2]]
    assert truncate_probs(probs, Sampling(top_p=0.5)).nonzero().tolist() == [[0, 0], [1, 2]]


def frequencies(logits: Tensor, sampling: Sampling, draws: int = 20_000) -> Tensor:
    numbers = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, _ = choose_tokens(logits.expand(draws, -1), sampling, numbers)
    return torch.bincount(tokens, minlength=logits.shape[-1])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_the_probabilities_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([[0.3, -1.0, 1.2, 0.0, -0.5, 0.8]])
    counts = frequencies(logits, Sampling(temperature=temperature))
    expected = 20_000 * (logits[0] / temperature).softmax(-1)
    # Chi-square with 5 degrees of freedom: 25.7 at p = 1e-4.
    assert float(((counts - expected) ** 2 / expected).sum()) < 25.7


def test_frequencies_after_truncation_are_renormalised() -> None:
    logits = torch.tensor([PROBS]).log()
    counts = frequencies(logits, Sampling(top_k=2))
    assert counts[0] == counts[2] == 0
    assert float(counts[1]) / 20_000 == pytest.approx(2 / 3, abs=0.015)


def test_log_probs_are_at_the_temperature_and_before_truncation() -> None:
    logits = torch.tensor([PROBS]).log()
    numbers = torch.tensor([0.0], dtype=torch.float64)
    tokens, log_probs = choose_tokens(logits, Sampling(temperature=0.5, top_k=1), numbers)
    squares = torch.tensor(PROBS).square()
    assert tokens.tolist() == [1]
    assert log_probs.dtype == torch.float32
    assert log_probs.item() == pytest.approx(math.log(0.25 / float(squares.sum())), abs=1e-6)


def test_without_numbers_the_likeliest_token_is_taken() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert choose_tokens(logits, Sampling(), None)[0].tolist() == [1, 0]


def test_the_likeliest_token_is_known_also_where_probabilities_are_equal_by_rounding() -> None:
    logits = torch.tensor([[0.0, 1e-9]])
    assert logits.softmax(-1)[0, 0] == logits.softmax(-1)[0, 1]
    assert choose_tokens(logits, Sampling(), None)[0].tolist() == [1]


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_log_probs_are_those_of_a_log_softmax(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(64, 5000, generator=generator)
    before = logits.clone()
    numbers = torch.rand(64, dtype=torch.float64, generator=generator)
    tokens, log_probs = choose_tokens(logits, Sampling(), numbers)
    exact = logits.double().log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(log_probs.double(), exact, atol=2e-5, rtol=0)
    assert torch.equal(logits, before)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, log_probs = choose_tokens(logits, Sampling(), None)
    exact = logits.double().log_softmax(-1).max().item()
    assert log_probs.item() == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("min_p", -0.1),
        ("completions_per_prompt", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"sampling\.{name}: got {value}"):
        Sampling(**{name: value})
