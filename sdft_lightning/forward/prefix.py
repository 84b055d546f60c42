"""Tokens that all prompts of a batch begin with are computed once, not once a row.

Chat templates open every prompt with the same system turn. Its keys and values are formed at batch
size 1 and repeated; gradients flow through the repetition. Results equal the plain path up to
rounding; `SHORTEST` and `can_share` say where the plain path is taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.forward.forward_paths import paths_of, sees_all_before
from sdft_lightning.forward.kv_cache import cache_of
from sdft_lightning.models.sharding import is_sharded

# Below this many shared tokens an extra forward pass is not worth its overhead.
SHORTEST = 8


class SplitPrompts(NamedTuple):
    """Prompts as a prefix that all rows share, and the rest of each.

    Attributes:
        prefix_ids: `(K,)`.
        rest_ids: `(B, R)`, padded on the left; every row has at least one token.
        rest_mask: `(B, R)`.
    """

    prefix_ids: Tensor
    rest_ids: Tensor
    rest_mask: Tensor


def can_share(model: Any) -> bool:
    """Whether what rows begin with can be computed apart for this model.

    Where `forward_paths` found so. Not with gradient checkpointing (it does without a cache), with
    a sliding window (its cache drops keys), or with attention kernels that want unbroken rows. Nor
    where parameters are spread over processes: one whose prompts share nothing would make a pass
    less than the others, which would wait for it for ever.
    """
    recomputes = model.training and _checkpoints_activations(model)
    shares = sees_all_before(model) and paths_of(model).shares_prefix
    return shares and not recomputes and not is_sharded(model)


def takes_own_mask(model: Any) -> bool:
    """Whether the model's attention takes a mask of its user's own, the same one in all layers."""
    return sees_all_before(model) and paths_of(model).packs


def _checkpoints_activations(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def split_prompts(prompt_ids: Tensor, prompt_mask: Tensor) -> SplitPrompts:
    """Cut off the longest prefix that all rows share, leaving each row one token at least.

    Args:
        prompt_ids: `(B, P)`, padded on the left.
        prompt_mask: `(B, P)`.
    """
    width = prompt_ids.shape[1]
    lengths = prompt_mask.sum(dim=1)  # (B,)
    shift = (width - lengths).unsqueeze(1)  # (B, 1)
    columns = torch.arange(width, device=prompt_ids.device)  # (P,)
    aligned = prompt_ids.gather(1, (columns + shift).clamp(max=width - 1))  # (B, P) from column 0
    same = (aligned == aligned[:1]).all(dim=0)  # (P,)
    same &= columns < lengths.min() - 1
    prefix = int(same.long().cumprod(dim=0).sum())
    longest = int(lengths.max()) - prefix
    kept = columns[-longest:] >= shift + prefix  # (B, R) the right end, less the prefix
    return SplitPrompts(aligned[0, :prefix], prompt_ids[:, -longest:], kept)


def split_if_worth(prompt_ids: Tensor, prompt_mask: Tensor) -> SplitPrompts:
    """Split off the prefix that all prompts share, where a pass of its own pays.

    Args:
        prompt_ids: `(B, P)`, padded on the left.
        prompt_mask: `(B, P)`.
    """
    if prompt_ids.shape[0] > 1:
        found = split_prompts(prompt_ids, prompt_mask)
        if found.prefix_ids.numel() >= SHORTEST:
            return found
    return SplitPrompts(prompt_ids[0, :0], prompt_ids, prompt_mask)


def encode_prefix(model: Any, prefix_ids: Tensor, rows: int) -> Any:
    """Keys and values of the prefix for so many rows.

    Args:
        model: A causal language model of transformers.
        prefix_ids: `(K,)`.
        rows: B.

    Returns:
        A cache of transformers with K positions of B rows.
    """
    cache = cache_of(model.base_model(input_ids=prefix_ids.unsqueeze(0), use_cache=True))
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    return cache
