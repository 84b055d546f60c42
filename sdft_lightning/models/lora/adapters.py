"""Adapters in a model: the options, how they get in, which parameters they are, peft's folder.

peft's layers are put into the model of transformers itself, without its `PeftModel` around it. So
the model keeps its class, its `base_model` and its head, and every path that reads hidden states or
keys and values works as without adapters.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdft_lightning.errors import UserError, check_choice, extra_remedy

ALL_LINEAR: Literal["all-linear"] = "all-linear"
# peft's own name for the only adapter of a model; it is part of the parameters' names.
ADAPTER = "default"
# Values of each parameter that the fingerprint of a base model reads.
_FINGERPRINT_VALUES = 64
_MOST = 2**16  # of rank and alpha: more than any layer is wide

Init = Literal["kaiming", "gaussian"]


@dataclass(frozen=True)
class LoRA:
    """Train W + s · B A instead of W, with A `(r, in)` and B `(out, r)` for each adapted layer.

    There is no dropout: it is off in both roles, and a resumed run would draw other numbers.

    Args:
        r: Rank of the adapters.
        alpha: The scale s is alpha / r.
        target_modules: all-linear adapts every linear layer but the output head, fused experts
            among them; or the ends of the layers' names, such as [q_proj, v_proj].
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
            if not 1 <= value <= _MOST:
                raise UserError(f"lora.{name}: got {value}, allowed are 1 and more, up to {_MOST}.")
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
        UserError: If peft is missing, a target is no linear layer inside the model, or none is.
    """
    _peft()
    _check_targets(model, lora)
    model.base_fingerprint = fingerprint(model)  # before the layers get other names
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        _inject(model, lora)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()  # peft took the dtype of the layer


def count_adapter_weights(model: Any, lora: LoRA) -> int:
    """How many weights the adapters of a model have.

    Args:
        model: A model on the meta device; it gets the adapters.
        lora: The options.

    Raises:
        UserError: As `add_adapter_`.
    """
    _peft()
    _check_targets(model, lora)
    with torch.device("meta"):
        _inject(model, lora)
    return sum(each.numel() for each in adapter_parameters(model).values())


def _inject(model: Any, lora: LoRA) -> None:
    """Let peft put adapters into a model, drawn from torch's global random numbers."""
    peft = _peft()
    experts = _fused_experts(model) if lora.target_modules == ALL_LINEAR else []
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        target_parameters=experts or None,
        exclude_modules=sorted(_linear(model, plain=False)) or None,
        use_rslora=lora.rslora,
        init_lora_weights=True if lora.init == "kaiming" else lora.init,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        peft.inject_adapter_in_model(config, model, ADAPTER)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"lora.target_modules: {type(model).__name__} cannot be adapted with "
            f"{lora.target_modules}: {error}. {_allowed(model)}"
        ) from error


def is_adapted(model: Any) -> bool:
    """Whether a model has adapters."""
    return bool(getattr(model, "peft_config", None))


def adapter_layers(model: Any) -> dict[str, Any]:
    """The adapted layers by name; none in a model without adapters."""
    if not is_adapted(model):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


def weight_name(layer: Any) -> str:
    """Name of the adapted parameter in the base layer: `weight`, or one of fused experts."""
    return getattr(layer, "parameter_name", "weight")


def adapted_weight(layer: Any) -> Tensor:
    """The frozen weight that an adapted layer stands on."""
    weight: Tensor = getattr(layer.get_base_layer(), weight_name(layer))
    return weight


def base_name(name: str) -> str:
    """A parameter's name in the model before it was adapted."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def frozen_matrices(model: Any) -> dict[str, list[str]]:
    """Weights of two and more dimensions without an adapter, by kind, but embeddings and the head.

    Args:
        model: An adapted model.

    Returns:
        Names of the parameters by the last two parts of their names, such as `experts.down_proj`.
    """
    adapted = {id(adapted_weight(layer)) for layer in adapter_layers(model).values()}
    ends = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    ends.append(model.get_output_embeddings())
    adapted |= {
        id(parameter) for part in ends if part is not None for parameter in part.parameters()
    }
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not parameter.requires_grad and id(parameter) not in adapted:
            plain = base_name(name).removesuffix(".weight")
            found.setdefault(".".join(plain.split(".")[-2:]), []).append(plain)
    return found


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
    identity = {
        "r": config.r,
        "alpha": config.lora_alpha,
        "rslora": config.use_rslora,
        "target_modules": sorted(config.target_modules),
    }
    if config.target_parameters:  # of fused experts; checkpoints of other models name none
        identity["target_parameters"] = sorted(config.target_parameters)
    return identity


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
            f"model.policy.lora: adapters need the package peft ({error}). {extra_remedy('lora')}."
        ) from error


def _linear(model: Any, plain: bool = True) -> set[str]:
    """Names of the linear layers but the head.

    Args:
        model: A causal language model of transformers.
        plain: Those that return W x + b; else those that do more, such as a router's choice.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | Conv1D)
        and part is not head
        and (type(part).forward in (nn.Linear.forward, Conv1D.forward) or _is_plain(part)) is plain
    }


@torch.no_grad()
def _is_plain(layer: Any) -> bool:
    """Whether a linear layer with a forward of its own returns one vector for one."""
    if not layer.weight.is_floating_point():
        return True  # 4-bit weights of bitsandbytes
    try:
        output = layer(layer.weight.new_zeros(1, layer.in_features))  # (1, out)
    except Exception:  # it wants more than a vector
        return False
    return isinstance(output, Tensor) and output.shape == (1, layer.out_features)


def _allowed(model: Any) -> str:
    ends = sorted({name.rpartition(".")[2] for name in _linear(model)})
    listed = f"{ALL_LINEAR}, or of {', '.join(ends)}" if ends else "none, as it has no linear layer"
    return f"Allowed are {listed}; embeddings and output head stay as they are."


def _fused_experts(model: Any) -> list[str]:
    """Names of the parameters `(E, out, in)` or `(E, in, out)` that hold all experts' matrices."""
    return [
        f"{name}.{own}"
        for name, part in model.named_modules()
        if "expert" in type(part).__name__.lower()
        for own, parameter in part.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point()
    ]


def _check_targets(model: Any, lora: LoRA) -> None:
    """Refuse targets that name no layer, or the head, whose weights the loss reads as they are."""
    linear = _linear(model)
    if lora.target_modules == ALL_LINEAR:
        if not linear:
            raise UserError(
                f"lora.target_modules: {ALL_LINEAR} finds no linear layer in "
                f"{type(model).__name__} that can be adapted. Train the whole model (without "
                "model.policy.lora), or use another one."
            )
        return
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise UserError(
                f"lora.target_modules: {target!r} is no linear layer of {type(model).__name__} "
                f"that can be adapted. {_allowed(model)}"
            )


# peft wraps a model twice when it loads an adapter, which shows in the names.
_PREFIX = "base_model.model."


def save_adapter(
    model: Any,
    folder: Path,
    base_name: str,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads, in safetensors.

    Args:
        model: An adapted model.
        folder: An existing folder.
        base_name: What transformers loads the base model by; written into the config.
        revision: The same of its branch, tag or commit.
        dtype: Of the adapters in the file; float32, as they are trained, without it.
    """
    from peft import get_peft_model_state_dict

    tensors = {
        f"{_PREFIX}{name}": tensor.detach().to("cpu", dtype).contiguous()
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
