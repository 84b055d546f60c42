"""In which dtype matrices are kept and multiplied, without dropout where nothing is trained.

A processor without bfloat16 arithmetic takes several times as long for a product in bfloat16 as in
float32. There the operands are multiplied in float32, which is at least as exact, and bfloat16 is
what results are kept in.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from sdft_lightning.errors import UserError, check_choice, extra_remedy

# Of transformers' implementations of attention these take float32; of others it is tried.
_TAKE_FLOAT32 = (None, "eager", "sdpa", "flex_attention")


def takes_float32(model: Any) -> bool:
    """Whether a model's attention is known to compute in float32; flash_attention_2 does not."""
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) in _TAKE_FLOAT32


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
def without_slow_autocast(model: Any) -> Iterator[None]:
    """Products of a float32 model in float32 where those of autocast would be slower.

    A model with weights of several dtypes keeps autocast, which may be what brings them together,
    and so does one whose attention may take half precision only.

    Args:
        model: Any, on one device.
    """
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    keeps = product_dtype(dtype, device) == dtype or not takes_float32(model)
    if keeps or any(
        each.dtype != torch.float32 for each in model.parameters() if each.is_floating_point()
    ):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put a model into eval mode, and each of its parts back into the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


Quantization = Literal["nf4", "fp4"]


def quantization_options(quantization: Quantization | None) -> dict[str, Any]:
    """What `from_pretrained` is told, so that linear layers are quantized while they are loaded.

    Args:
        quantization: Kind of 4-bit numbers; None leaves the weights as they are.

    Returns:
        Keyword arguments; none without quantization.

    Raises:
        UserError: If the kind is unknown, bitsandbytes is missing, or there is no CUDA device.
    """
    if quantization is None:
        return {}
    check_choice("model.policy.quantization", quantization, get_args(Quantization))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.policy.quantization: {quantization} needs the package bitsandbytes. "
            f"{extra_remedy('qlora')}; or train plain adapters, without quantization."
        )
    if not torch.cuda.is_available():
        raise UserError(
            f"model.policy.quantization: {quantization} needs a CUDA device, and torch sees none. "
            "Leave quantization out and train plain adapters (model.policy.lora)."
        )
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        ),
        # Each rank of a machine on its own device.
        "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))},
    }
