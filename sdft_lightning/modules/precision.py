"""What precisions ask for beyond Lightning's own: a warning, and clipping in bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision

from sdft_lightning.rollout.weights import has_native_bfloat16


def warn_of_slow_precision(precision: str, device: torch.device) -> None:
    """Warn where bfloat16 costs time instead of saving it.

    Args:
        precision: Lightning's name, e.g. bf16-mixed.
        device: Where the run computes.
    """
    if not precision.startswith("bf16") or has_native_bfloat16(device):
        return
    warnings.warn(
        f"trainer.precision: {precision} on a {device.type} device without bfloat16 arithmetic, "
        "where a step takes several times as long as in float32. Use --trainer.precision=32-true.",
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
