"""The sampler is not quite the policy: how far they are apart, and the weights that correct it.

An engine other than the trainer's own model computes in another dtype and order, so its tokens are
drawn from a distribution q a little beside the policy's p. Each sampled token tells the ratio p/q;
`trained_log_probs` computes p in bounded memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.losses.bounded import CHUNK_ELEMENTS, by_device, cast_side
from sdft_lightning.losses.divergence import log_probs
from sdft_lightning.rollout.sampling import Sampling, truncate_probs
from sdft_lightning.types import OutputHead

CorrectionKind = Literal["none", "token", "sequence"]


@dataclass(frozen=True)
class Mismatch:
    """What is done about a sampler that is not quite the policy: correct the loss, and warn.

    Args:
        correction: none; token weighs each token of the loss by min(p/q, cap); sequence, as the
            paper's code, weighs all tokens of a completion by the mean of min(p/q, cap) over those
            in the loss.
        cap: Largest ratio.
        warn_above: Mean |log p − log q| of an optimizer step, in nats, from which on a warning is
            given.
        warn_growth: A warning is given, too, at so many times the mean of the run's first five
            steps (or of 0.02 nats, if that is more).
        stop_above: Nats from which on the run ends with an error; never without it.
    """

    correction: CorrectionKind = "none"
    cap: float = 2.0
    warn_above: float = 0.1
    warn_growth: float = 5.0
    stop_above: float | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_choice("model.mismatch.correction", self.correction, get_args(CorrectionKind))
        limits = {
            "cap": (self.cap >= 1, "1 and more: a sampler without any mismatch has the ratio 1"),
            "warn_above": (self.warn_above > 0, "above 0"),
            "warn_growth": (self.warn_growth > 1, "above 1"),
            "stop_above": (self.stop_above is None or self.stop_above > 0, "above 0, or null"),
        }
        for name, (allowed, text) in limits.items():
            if not allowed:
                raise UserError(
                    f"model.mismatch.{name}: got {getattr(self, name)}, allowed is {text}."
                )

    def weights(self, difference: Tensor, keep: Tensor) -> Tensor:
        """Weights of the kept tokens, without gradient.

        Args:
            difference: `(N,)` log p − log q of the kept tokens, row by row.
            keep: `(R, T)` boolean with N true, the tokens in the loss.

        Returns:
            `(N,)` float32.

        Raises:
            UserError: If a difference is not finite.
        """
        _check_finite(difference)
        if self.correction == "none":
            return torch.ones_like(difference)
        ratios = difference.detach().float().exp().clamp(max=self.cap)  # (N,)
        if self.correction == "token":
            return ratios
        rows = torch.zeros(keep.shape, device=ratios.device)  # (R, T)
        rows[keep] = ratios
        means = rows.sum(dim=1) / keep.sum(dim=1).clamp(min=1)  # (R,)
        return means.unsqueeze(1).expand_as(rows)[keep]  # (N,)

    def statistics(self, difference: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        """What is logged about the tokens of a step.

        Args:
            difference: `(N,)` log p − log q.
            weights: `(N,)` of each token in the means; equal without them.

        Returns:
            `log_prob_difference`, the mean of |log p − log q| in nats, its largest value, the mean
            ratio p/q (1 in expectation under q), and the part of the tokens above the cap.

        Raises:
            UserError: If a difference is not finite.
        """
        _check_finite(difference)
        if difference.numel() == 0:
            difference, weights = difference.new_zeros(1), None
        if weights is None:
            weights = torch.ones_like(difference)
        weights = weights / weights.sum()  # (N,)
        size = difference.detach().float().abs()  # (N,)
        ratios = difference.detach().float().exp()  # (N,)
        return {
            "log_prob_difference": (weights * size).sum(),
            "log_prob_difference_max": size.max(),
            "ratio": (weights * ratios).sum(),
            "capped_fraction": (weights * (ratios > self.cap)).sum(),
        }


def _check_finite(difference: Tensor) -> None:
    odd = int((~torch.isfinite(difference.detach())).sum())
    if odd:
        raise UserError(
            f"model.mismatch: log p - log q of {odd} of {difference.numel()} sampled "
            "tokens is not finite, and the weights would become NaN with it. Either the engine "
            "gave such log-probabilities (look into its log), or the student's own weights have "
            "gone that way: go on from an earlier checkpoint with a lower learning rate."
        )


def trained_log_probs(
    hidden: Tensor,
    head: OutputHead,
    token_ids: Tensor,
    sampling: Sampling,
    truncated: bool,
    chunk_elements: int | None = None,
) -> Tensor:
    """Log-probability of each token at the sampling temperature, without N · V logits.

    Args:
        hidden: `(N, D)` of the student.
        head: Its head.
        token_ids: `(N,)` the sampled tokens.
        sampling: Temperature and truncation.
        truncated: Among the tokens that the truncation keeps, and not among all. A sampled token
            counts as kept: at the edge, rounding decides whether it is.
        chunk_elements: Logits that exist at once; None as in `bounded_divergence`.

    Returns:
        `(N,)` float32.
    """
    side = cast_side(hidden, head, head.weight.shape[0])
    elements = chunk_elements or by_device(CHUNK_ELEMENTS, hidden.device.type)
    chunk = max(1, elements // head.weight.shape[0])
    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            every = log_probs(side.logits(side.raw(part)), sampling.temperature)  # (C, V)
            index = token_ids[part].unsqueeze(-1)  # (C, 1)
            chosen = every.gather(-1, index)  # (C, 1)
            if truncated:
                kept = truncate_probs(every.exp(), sampling)  # (C, V)
                kept = kept.scatter(-1, index, chosen.exp())  # (C, V)
                chosen = chosen - kept.sum(dim=-1, keepdim=True).log()  # (C, 1)
            parts.append(chosen.squeeze(-1))
    return torch.cat(parts)  # (N,)
