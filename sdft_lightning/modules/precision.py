"""What precisions ask for beyond Lightning's own: a warning, and clipping in bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision

from sdft_lightning.products import product_dtype
from sdft_lightning.rollout.weights import has_native_bfloat16


def warn_of_slow_precision(precision: str, device: torch.device) -> None:
    """Warn where bfloat16 saves no time, or costs some.

    Args:
        precision: Lightning's name, e.g. bf16-mixed.
        device: Where the run computes.
    """
    if not precision.startswith("bf16") or has_native_bfloat16(device):
        return
    if precision == "bf16-mixed" and product_dtype(torch.bfloat16, device.type) == torch.float32:
        outcome = (
            "so that products are made in float32 and only what is kept for the backward pass is "
            "bfloat16: a step takes as long as in float32, and less memory with models that are "
            "computed in fused blocks"
        )
        remedy = "For exact activations use --trainer.precision=32-true."
    else:
        outcome = "where a step takes longer than in float32, with some processors several times"
        remedy = "Use --trainer.precision=32-true."
    warnings.warn(
        f"trainer.precision: {precision} on a {device.type} device without bfloat16 arithmetic, "
        f"{outcome}. {remedy}",
        stacklevel=2,
    )


@contextmanager
def clipping_without_scale(plugin: Any) -> Iterator[None]:
    """Let a precision without a scale clip the gradients of any optimizer.

    Args:
        plugin: Lightning's precision plugin; its refusal of fused optimizers is put aside where it
            has no scaler.
    """
    if not isinstance(plugin, MixedPrecision) or plugin.scaler is not None:
        yield
        return
    plugin.clip_gradients = partial(Precision.clip_gradients, plugin)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del plugin.clip_gradients
