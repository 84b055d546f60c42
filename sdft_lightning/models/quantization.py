"""Frozen weights in 4 bits (QLoRA, arXiv 2305.14314), through bitsandbytes on a CUDA device."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal, get_args

import torch

from sdft_lightning.errors import UserError, check_choice

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
            f"model.policy.quantization: {quantization} needs the package bitsandbytes. Install "
            "the extra: pip install 'sdft-lightning[qlora]'; or train plain adapters, without "
            "quantization."
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
