"""What the trained model says of tokens that another engine sampled, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft_lightning.losses.bounded import CHUNK_ELEMENTS
from sdft_lightning.losses.chunked import by_device, cast_side
from sdft_lightning.losses.divergence import log_probs
from sdft_lightning.rollout.sampling import Sampling, truncate_probs
from sdft_lightning.types import OutputHead


@torch.no_grad()
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
