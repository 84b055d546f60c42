"""From logits to tokens: temperature, truncation, the inverse CDF, random numbers, stop texts.

Random numbers belong to a row, not to the batch or process in which it is sampled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdft_lightning.errors import UserError

# Far more than any model writes and any machine holds: a slip, which would end in its memory.
MOST_NEW_TOKENS = 2**20
_MOST_COMPLETIONS = 2**16
# Tokens whose probabilities are first added up together.
_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled; the defaults are the paper's.

    Args:
        max_new_tokens: Longest completion, in tokens; at most 1,048,576.
        temperature: Logits are divided by it, also in the loss. 1 is on-policy.
        top_k: Keep the k likeliest tokens, with all that tie with the last; 0 keeps all.
        top_p: Keep the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: Keep tokens with at least this fraction of the likeliest one's probability; 0
            keeps all.
        completions_per_prompt: Completions sampled for each prompt.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    completions_per_prompt: int = 1

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        limits = {
            "max_new_tokens": (
                1 <= self.max_new_tokens <= MOST_NEW_TOKENS,
                f"1 and more, up to {MOST_NEW_TOKENS}",
            ),
            "temperature": (
                0 < self.temperature < math.inf,
                "above 0 and finite (validation is greedy by itself)",
            ),
            "top_k": (self.top_k >= 0, "0 (all tokens) and more"),
            "top_p": (0 < self.top_p <= 1, "0 < top_p <= 1"),
            "min_p": (0 <= self.min_p < 1, "0 <= min_p < 1"),
            "completions_per_prompt": (
                1 <= self.completions_per_prompt <= _MOST_COMPLETIONS,
                f"1 and more, up to {_MOST_COMPLETIONS}",
            ),
        }
        for name, (allowed, text) in limits.items():
            if not allowed:
                raise UserError(f"sampling.{name}: got {getattr(self, name)}, allowed is {text}.")


def truncate_probs(probs: Tensor, sampling: Sampling) -> Tensor:
    """Zero the tokens that top-k, top-p and min-p drop; each looks at the whole distribution.

    Args:
        probs: `(B, V)` probabilities.
        sampling: Which tokens stay.

    Returns:
        `(B, V)`, not renormalised.
    """
    if sampling.top_k == 0 and sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return probs
    keep = torch.ones_like(probs, dtype=torch.bool)  # (B, V)
    if 0 < sampling.top_k < probs.shape[-1]:
        smallest = probs.topk(sampling.top_k, dim=-1).values[:, -1:]  # (B, 1)
        keep &= probs >= smallest
    if sampling.top_p < 1.0:
        ordered, indices = probs.sort(dim=-1, descending=True)  # (B, V)
        before = ordered.cumsum(dim=-1) - ordered  # (B, V) mass of likelier tokens
        keep &= torch.zeros_like(keep).scatter(-1, indices, before < sampling.top_p)
    if sampling.min_p > 0.0:
        keep &= probs >= sampling.min_p * probs.amax(dim=-1, keepdim=True)
    return probs * keep


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes a uniform number.

    Args:
        probs: `(B, V)`, not necessarily normalised; zero for tokens that must not be chosen.
        uniforms: `(B,)` in [0, 1), float64.

    Returns:
        `(B,)` token ids, never one with probability zero.
    """
    dtype, size = _sum_dtype(probs.device), probs.shape[1]
    uniforms = on_device(uniforms, probs.device).unsqueeze(-1)  # (B, 1)
    # First the block of tokens, then the token in it: few numbers are summed up in float64.
    whole = size - size % _BLOCK
    sums = probs[:, :whole].unflatten(1, (-1, _BLOCK)).sum(dim=-1, dtype=dtype)  # (B, V / b)
    if whole < size:
        sums = torch.cat([sums, probs[:, whole:].sum(dim=-1, keepdim=True, dtype=dtype)], dim=1)
    blocks, rest = _passed(sums, uniforms * sums.sum(dim=-1, keepdim=True))  # (B, 1) each
    columns = blocks * _BLOCK + torch.arange(_BLOCK, device=probs.device)  # (B, b)
    inside = probs.gather(1, columns.clamp(max=size - 1)).to(dtype) * (columns < size)  # (B, b)
    tokens = blocks * _BLOCK + _passed(inside, rest)[0]  # (B, 1)
    return tokens.squeeze(-1).clamp(max=size - 1)  # NaN is behind the last; `generate` says so


def _sum_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it: in float32 the sum over a vocabulary blurs rare tokens."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_device(uniforms: Tensor, device: torch.device) -> Tensor:
    """Uniform numbers where `inverse_cdf` wants them, in its dtype; those that are there stay."""
    return uniforms.to(device, _sum_dtype(device))


def _passed(masses: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sum of `(B, n)` masses passes a target `(B, 1)`, and what of it is left there.

    It is never a place without mass: a target that rounding has put too high comes down.
    """
    cumulative = masses.cumsum(dim=-1)  # (B, n)
    total = cumulative[:, -1:]  # (B, 1)
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    places = torch.searchsorted(cumulative, target, right=True)  # (B, 1)
    places = places.clamp(max=masses.shape[-1] - 1)
    return places, target - torch.nn.functional.pad(cumulative, (1, 0)).gather(1, places)


def choose_tokens(
    logits: Tensor, sampling: Sampling, uniforms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability.

    Args:
        logits: `(B, V)`.
        sampling: Temperature and truncation.
        uniforms: `(B,)`, or None for the likeliest token.

    Returns:
        Token ids `(B,)`, and their log-probabilities `(B,)` in float32 at the temperature, before
        truncation.
    """
    if sampling.temperature != 1.0:
        logits = logits.float() / sampling.temperature
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)  # (B, V), one copy
    if uniforms is None:
        tokens = logits.argmax(dim=-1)  # (B,) of logits: probabilities may tie by rounding
    else:
        tokens = inverse_cdf(truncate_probs(probs, sampling), uniforms)  # (B,)
    return tokens, probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log()


def row_key(row_id: str) -> int:
    """A 63-bit number for a row's id, the same on every machine and Python.

    Args:
        row_id: The id of the row.

    Returns:
        Non-negative integer.
    """
    digest = hashlib.blake2b(row_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def row_uniforms(seed: int, step: int, row_ids: Sequence[str], samples: int, length: int) -> Tensor:
    """One uniform number in [0, 1) for each (row, sample, position), drawn from (seed, step, row).

    Counter-based (numpy's Philox), so the numbers of a row depend on nothing but its key: not on
    the batch it stands in, the rank, or what was drawn before.

    Args:
        seed: Seed of the run.
        step: Optimizer step.
        row_ids: B ids.
        samples: Completions of each row.
        length: Longest completion, T.

    Returns:
        `(B · samples, T)` float64 on the CPU.
    """
    numbers = [
        np.random.Generator(
            np.random.Philox(np.random.SeedSequence([seed, step, row_key(row_id), sample]))
        ).random(length)
        for row_id in row_ids
        for sample in range(samples)
    ]
    return torch.from_numpy(np.stack(numbers))  # (B · samples, T)


def row_seeds(seed: int, step: int, row_ids: Sequence[str], samples: int) -> list[int]:
    """One 63-bit seed for each (row, sample), for samplers that take a seed and not the numbers.

    Args:
        seed: Seed of the run.
        step: Optimizer step.
        row_ids: B ids.
        samples: Completions of each row.

    Returns:
        B · samples seeds.
    """
    return [
        int(
            np.random.SeedSequence([seed, step, row_key(row_id), sample]).generate_state(
                1, np.uint64
            )[0]
        )
        >> 1
        for row_id in row_ids
        for sample in range(samples)
    ]


class StopTexts:
    """Looks for any of several texts at the end of growing completions.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: The texts; empty ones are left out.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.texts = [text for text in texts if text]
        # Every token holds a byte at least; one more, as the text may begin inside a token.
        self._lookback = 1 + max((len(text.encode()) for text in self.texts), default=0)

    def found(self, completion_ids: Tensor) -> Tensor:
        """Which completions end with, or have just passed, one of the texts.

        Args:
            completion_ids: `(A, T)`, without padding.

        Returns:
            `(A,)` boolean.
        """
        if not self.texts:
            return torch.zeros(
                completion_ids.shape[0], dtype=torch.bool, device=completion_ids.device
            )
        ends = self.tokenizer.batch_decode(completion_ids[:, -self._lookback :])
        hits = [any(text in end for text in self.texts) for end in ends]
        return torch.tensor(hits, device=completion_ids.device)

    def cut(self, completion: str) -> str:
        """A completion up to the first of the texts."""
        for text in self.texts:
            completion = completion.split(text)[0]
        return completion
