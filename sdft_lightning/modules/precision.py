"""What precisions ask for beyond Lightning's own: a warning, and clipping in bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision

from sdft_lightning.models.precision import product_dtype
from sdft_lightning.rollout.student import has_native_bfloat16


def warn_of_slow_precision(precision: str, device: torch.device, weights: torch.dtype) -> None:
    """Warn where bfloat16 saves no time, or costs some.

    Args:
        precision: Lightning's name, e.g. bf16-mixed.
        device: Where the run computes.
        weights: Dtype of the student's weights, those below adapters if there are any.
    """
    rounded = weights == torch.bfloat16
    if has_native_bfloat16(device) or not (rounded or precision.startswith("bf16")):
        return
    asked = f"trainer.precision: {precision}"
    if rounded and not precision.startswith("bf16"):
        asked = "model.weights_dtype: bfloat16"
    outcome = "where a step takes longer than in float32, with some processors several times"
    if product_dtype(torch.bfloat16, device.type) == torch.float32:
        outcome = "so that products are made in float32 and a step is no faster than with 32-true"
        if rounded:
            outcome += (
                ". Models other than Llama, Qwen2 and Qwen3, and these with adapters or activation "
                "checkpointing, are multiplied in bfloat16, which takes several times as long"
            )
    remedies = ["--trainer.precision=32-true"] if precision.startswith("bf16") else []
    remedies += ["--model.weights_dtype=float32"] if rounded else []
    warnings.warn(
        f"{asked} on a {device.type} device without bfloat16 arithmetic, {outcome}. "
        f"Use {' and '.join(remedies)} unless memory is short.",
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
