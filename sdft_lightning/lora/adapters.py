"""Adapters in a model: the options, how they get in, and which parameters they are.

peft's layers are put into the model of transformers itself, without its `PeftModel` around it. So
the model keeps its class, its `base_model` and its head, and every path that reads hidden states or
keys and values works as without adapters.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sdft_lightning.errors import UserError, check_choice

ALL_LINEAR: Literal["all-linear"] = "all-linear"
# peft's own name for the only adapter of a model; it is part of the parameters' names.
ADAPTER = "default"
# Values of each parameter that the fingerprint of a base model reads.
_FINGERPRINT_VALUES = 64

Init = Literal["kaiming", "gaussian"]


@dataclass(frozen=True)
class LoRA:
    """Train W + s · B A instead of W, with A `(r, in)` and B `(out, r)` for each adapted layer.

    There is no dropout: it is off in both roles, and a resumed run would draw other numbers.

    Args:
        r: Rank of the adapters.
        alpha: The scale s is alpha / r.
        target_modules: all-linear adapts every linear layer but the output head; or the ends of
            the layers' names, such as [q_proj, v_proj].
        rslora: The scale is alpha / √r instead (rank-stabilised, arXiv 2312.03732).
        init: How A is drawn, kaiming (uniform) or gaussian (standard deviation 1 / r); B is zero,
            so that training starts at the base model.
    """

    r: int = 8
    alpha: int = 16
    target_modules: list[str] | Literal["all-linear"] = ALL_LINEAR
    rslora: bool = False
    init: Init = "kaiming"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, value in (("r", self.r), ("alpha", self.alpha)):
            if value < 1:
                raise UserError(f"lora.{name}: got {value}, allowed are 1 and more.")
        check_choice("lora.init", self.init, get_args(Init))
        if not self.target_modules:
            raise UserError(
                f"lora.target_modules: got none. Give `{ALL_LINEAR}` or names of linear layers; "
                "without adapters leave `lora` out."
            )


def add_adapter_(model: Any, lora: LoRA, seed: int) -> None:
    """Put adapters into a model and freeze the rest; they are float32 whatever the model is.

    Args:
        model: A causal language model of transformers.
        lora: The options.
        seed: A is drawn with it, so all ranks have the same, whatever was drawn before.

    Raises:
        UserError: If peft is missing, or a target is no linear layer inside the model.
    """
    peft = _peft()
    _check_targets(model, lora)
    model.base_fingerprint = fingerprint(model)  # before the layers get other names
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        init_lora_weights=True if lora.init == "kaiming" else lora.init,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, ADAPTER)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()  # peft took the dtype of the layer


def is_adapted(model: Any) -> bool:
    """Whether a model has adapters."""
    return bool(getattr(model, "peft_config", None))


def adapter_layers(model: Any) -> dict[str, Any]:
    """The adapted layers by name; none in a model without adapters."""
    if not is_adapted(model):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


def adapter_parameters(model: Any) -> dict[str, nn.Parameter]:
    """A and B of all adapted layers, by their names in the model."""
    return {
        f"{layer}.{name}": parameter
        for layer, part in adapter_layers(model).items()
        for name, parameter in part.named_parameters()
        if name.startswith("lora_")
    }


def trained_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The adapters of an adapted model, all parameters of another, by name; tied ones once."""
    return adapter_parameters(model) if is_adapted(model) else dict(model.named_parameters())


def adapter_identity(model: Any) -> dict[str, Any] | None:
    """What tells one shape of adapters from another, in plain types; None without adapters."""
    if not is_adapted(model):
        return None
    config = model.peft_config[ADAPTER]
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "rslora": config.use_rslora,
        "target_modules": sorted(config.target_modules),
    }


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A short hash of some values of each floating-point parameter.

    Read as bfloat16, so that a model loaded in float32 and in bfloat16 has the same; quantized
    layers are left out.
    """
    samples: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.is_floating_point():
            flat = parameter.detach().flatten()
            step = max(1, flat.numel() // _FINGERPRINT_VALUES)
            samples.append(flat[::step][:_FINGERPRINT_VALUES].to(torch.bfloat16))
    values = torch.cat(samples).cpu().view(torch.int16)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _peft() -> Any:
    """The package peft.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UserError(
            f"model.lora: adapters need the package peft ({error}). Install the extra: pip install "
            "'sdft-lightning[lora]'."
        ) from error


def _check_targets(model: Any, lora: LoRA) -> None:
    """Refuse targets that name no layer, or the head, whose weights the loss reads as they are."""
    if lora.target_modules == ALL_LINEAR:
        return
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = {
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and part is not head
    }
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            allowed = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(
                f"lora.target_modules: {target!r} is no linear layer of {type(model).__name__} "
                f"that can be adapted. Allowed are {ALL_LINEAR}, or of {allowed}; embeddings and "
                "output head stay as they are."
            )
