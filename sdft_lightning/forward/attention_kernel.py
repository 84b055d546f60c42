"""Attention kernels: which is trained with, and those that compute in half precision only.

On CPUs the backward pass of the flash kernel takes several times as long in bfloat16 as the plain
formula does on short rows. The plain formula computes in float32 and keeps its scores, so it is
taken only where these are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdft_lightning.models.precision import takes_float32

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


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Inside, a model whose kernel is of GPUs or of half precision computes on any device."""
    if takes_float32(model):
        yield
        return
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@torch.no_grad()
def autocast_if_needed_(model: Any) -> None:
    """Let a float32 model compute in bfloat16 autocast if its attention refuses float32.

    A teacher's weights stay in float32 beside a student in bfloat16, with the student's kernel,
    or with plain attention where autocast does not help.

    Args:
        model: A causal language model of transformers, whole, in the context that it is used in.
    """
    if takes_float32(model):
        return
    base = model.base_model
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)  # (1, 2)
    if _computes(base, ids):
        return
    hooks = [
        base.register_forward_pre_hook(_enter_autocast),
        base.register_forward_hook(_leave_autocast, always_call=True),
    ]
    if not _computes(base, ids):
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation("eager")


def _computes(base: Any, ids: Tensor) -> bool:
    try:
        base(input_ids=ids, use_cache=False)
    except Exception:  # kernels refuse in their own words
        return False
    return True


def _enter_autocast(base: nn.Module, _: Any) -> None:
    first = next(base.parameters())
    needed = first.dtype == torch.float32 and not torch.is_autocast_enabled(first.device.type)
    autocast = torch.autocast(first.device.type, torch.bfloat16, enabled=True) if needed else None
    if autocast is not None:
        autocast.__enter__()
    base.__dict__["own_autocast"] = autocast


def _leave_autocast(base: nn.Module, _: Any, output: Any) -> None:
    autocast = base.__dict__.pop("own_autocast", None)
    if autocast is not None:
        autocast.__exit__(None, None, None)
