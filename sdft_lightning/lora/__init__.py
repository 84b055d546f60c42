"""Low-rank adapters (LoRA) through peft: what is trained, what is shared, what is saved."""

from sdft_lightning.lora.adapters import (
    LoRA,
    adapter_identity,
    adapter_parameters,
    add_adapter_,
    is_adapted,
)
from sdft_lightning.lora.checkpoint import keep_adapters_only_
from sdft_lightning.lora.copies import adapter_distance, base_copy, merged_copy, sharing_copy
from sdft_lightning.lora.saving import save_adapter

__all__ = [
    "LoRA",
    "adapter_distance",
    "adapter_identity",
    "adapter_parameters",
    "add_adapter_",
    "base_copy",
    "is_adapted",
    "keep_adapters_only_",
    "merged_copy",
    "save_adapter",
    "sharing_copy",
]
