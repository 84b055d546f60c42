"""Adapters as a folder of peft's own format."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sdft_lightning.models.lora.adapters import ADAPTER

# peft wraps a model twice when it loads an adapter, which shows in the names.
_PREFIX = "base_model.model."


def save_adapter(model: Any, folder: Path, base_name: str, revision: str | None = None) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads, in safetensors.

    Args:
        model: An adapted model.
        folder: An existing folder.
        base_name: What transformers loads the base model by; written into the config.
        revision: The same of its branch, tag or commit.
    """
    from peft import get_peft_model_state_dict

    tensors = {
        f"{_PREFIX}{name}": tensor.detach().contiguous().cpu()
        for name, tensor in get_peft_model_state_dict(model, adapter_name=ADAPTER).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ADAPTER])
    config.base_model_name_or_path, config.revision = base_name, revision
    config.inference_mode = True  # loaded frozen, as peft saves it
    for name in ("target_modules", "target_parameters"):
        targets = getattr(config, name)
        if targets is not None and not isinstance(targets, str):
            setattr(config, name, sorted(targets))  # a set's order differs by process
    config.save_pretrained(str(folder))
