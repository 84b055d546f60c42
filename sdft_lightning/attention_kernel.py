"""Which of torch's attention kernels is trained with, where the one that torch takes is slow.

On CPUs the backward pass of the flash kernel takes several times as long in bfloat16 as the plain
formula does on short rows. The plain formula computes in float32 and keeps its scores, so it is
taken only where these are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Scores of a layer: 4 MB in float32. With more the flash kernel is as fast.
_MOST_SCORES = 2**20


@contextmanager
def training_attention(model: Any, rows: int, tokens: int) -> Iterator[None]:
    """Let a forward pass with gradients use the plain formula where that is faster.

    Args:
        model: A causal language model of transformers.
        rows: Sequences of the pass.
        tokens: Tokens of the longest, padding included.
    """
    if _plain_is_faster(model, rows, tokens):
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


def _plain_is_faster(model: Any, rows: int, tokens: int) -> bool:
    if not torch.is_grad_enabled() or model.device.type != "cpu":
        return False
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    dtype = model.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    # Recomputed activations must come from the same kernel, and they are outside of this.
    recomputes = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    heads = getattr(model.config, "num_attention_heads", None)
    if dtype != torch.bfloat16 or recomputes or heads is None:
        return False
    return bool(rows * heads * tokens**2 <= _MOST_SCORES)
