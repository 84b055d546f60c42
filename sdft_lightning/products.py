"""In which dtype matrix products are made: the one that is asked for, or float32 where it is slow.

A processor without bfloat16 arithmetic takes several times as long for a product in bfloat16 as in
float32. There the operands are multiplied in float32, which is at least as exact, and bfloat16 is
what results are kept in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def multiplies_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 on this processor no slower than float32 (oneDNN)."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(dtype: torch.dtype, device: str = "cpu") -> torch.dtype:
    """The dtype to multiply in, where results are wanted in another.

    Args:
        dtype: Of the results.
        device: Type of the device, e.g. cuda; only CPUs are without bfloat16 here.
    """
    if dtype == torch.bfloat16 and device == "cpu" and not multiplies_bfloat16():
        return torch.float32
    return dtype


@contextmanager
def without_slow_autocast(device: str) -> Iterator[None]:
    """Products in the weights' own dtype where those of autocast would be slower.

    Args:
        device: Type of the device that computes.
    """
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype, enabled=product_dtype(dtype, device) == dtype):
        yield
