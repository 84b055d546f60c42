"""Precisions that a device only imitates."""

from __future__ import annotations

import warnings

import torch

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
