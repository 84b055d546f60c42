"""Low-rank adapters (LoRA) through peft: what is trained, what is shared, what is saved."""

from sdft_lightning.models.lora.adapters import (
    ALL_LINEAR,
    LoRA,
    adapted_weight,
    adapter_identity,
    adapter_layers,
    adapter_parameters,
    add_adapter_,
    count_adapter_weights,
    frozen_matrices,
    is_adapted,
    save_adapter,
    trained_parameters,
)
from sdft_lightning.models.lora.copies import (
    base_copy,
    check_adapters_are_called,
    effective_weights,
    keep_adapters_only_,
    merged_copy,
    merged_weight,
    sharing_copy,
)

__all__ = [
    "ALL_LINEAR",
    "LoRA",
    "adapted_weight",
    "adapter_identity",
    "adapter_layers",
    "adapter_parameters",
    "add_adapter_",
    "base_copy",
    "check_adapters_are_called",
    "count_adapter_weights",
    "effective_weights",
    "frozen_matrices",
    "is_adapted",
    "keep_adapters_only_",
    "merged_copy",
    "merged_weight",
    "save_adapter",
    "sharing_copy",
    "trained_parameters",
]
