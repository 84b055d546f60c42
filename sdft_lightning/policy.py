"""The policy: a causal language model made ready for training, with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from sdft_lightning.errors import UserError
from sdft_lightning.forward_paths import find_paths
from sdft_lightning.hidden import check_output_head
from sdft_lightning.lora import LoRA, adapter_parameters, add_adapter_
from sdft_lightning.quantization import Quantization, quantization_options
from sdft_lightning.tokenization import EMBEDDED, load_tokenizer, resolve_model, stop_ids

WeightsDtype = Literal["float32", "bfloat16"]


class Policy(NamedTuple):
    """A model with what belongs to it.

    Attributes:
        model: A causal language model of transformers, dropout off, in train mode.
        tokenizer: Its tokenizer.
        stop_ids: Ids of which any ends a completion.
    """

    model: Any
    tokenizer: Any
    stop_ids: list[int]


def load_policy(
    model_name: str,
    revision: str | None = None,
    weights_dtype: WeightsDtype = "float32",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    lora: LoRA | None = None,
    quantization: Quantization | None = None,
    seed: int = 42,
) -> Policy:
    """Load a policy; safetensors only, and never code from the Hub.

    Args:
        model_name: `embedded`, a folder written by `save_pretrained`, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        weights_dtype: Dtype of the trained weights. With bfloat16 small updates are rounded
            away (METHOD §4).
        attn_implementation: Passed to transformers, e.g. `sdpa` or `flash_attention_2`.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        lora: Train adapters only, and freeze the model.
        quantization: Keep the frozen linear layers in 4 bits; with `lora`, on a CUDA device.
        seed: Adapters are drawn with it.

    Returns:
        The policy.

    Raises:
        UserError: If there is no such model, or it is not one that can be trained here.
    """
    if quantization is not None and lora is None:
        raise UserError(
            f"model.quantization: got {quantization} without model.lora; 4-bit weights cannot be "
            "trained. Set model.lora (e.g. --model.lora.r=8), or leave quantization out."
        )
    options = quantization_options(quantization)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    model = _load_model(model_name, revision, weights_dtype, options)
    tokenizer = load_tokenizer(model_name, revision)
    check_vocabulary(model, tokenizer, model_name)
    disable_dropout_(model)
    if lora is not None:
        add_adapter_(model, lora, seed)
    find_paths(model)
    check_output_head(model)
    if gradient_checkpointing:
        if lora is not None:
            # Else reentrant checkpoints see no input with gradient below the first adapter.
            # transformers 5.23 does it by itself.
            model.enable_input_require_grads()
        # Renamed in the course of transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    model.train()
    return Policy(model, tokenizer, stop_ids(tokenizer, model.generation_config))


def _load_model(
    model_name: str,
    revision: str | None,
    weights_dtype: WeightsDtype,
    options: dict[str, Any],
) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_model(model_name),
            revision=revision,
            dtype=getattr(torch, weights_dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(
            f"model_name: no model could be loaded from {model_name}: {error} Allowed are "
            f"`{EMBEDDED}`, a folder written by save_pretrained with safetensors, or a Hub id "
            "that this machine can reach."
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"model_name: the weights of {model_name} lack {len(missing)} tensors, e.g. "
            f"{missing[0]}, which would be drawn at random. Use a complete folder."
        )
    return model


def check_vocabulary(model: Any, tokenizer: Any, model_name: str) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings.

    Raises:
        UserError: If ids would be out of range.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"model_name: the tokenizer of {model_name} has {len(tokenizer)} tokens, the model "
            f"only {rows} embeddings. Use the tokenizer that belongs to the model."
        )


def disable_dropout_(model: nn.Module) -> None:
    """Turn all dropout off: in modules, and in the rates that attention reads at run time."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for name in list(vars(config) if config is not None else {}):
        if name.endswith(("dropout", "pdrop", "dropout_prob")) and isinstance(
            getattr(config, name), float
        ):
            setattr(config, name, 0.0)


@contextmanager
def moved_not_cast(model: nn.Module) -> Iterator[None]:
    """Inside, a cast of the model (Lightning's bf16-true) leaves its buffers and adapters out.

    Buffers are rotary frequencies: rounded to bfloat16 they turn far positions astray, the
    teacher's do not round with them, and an exported model has unrounded ones again. Adapters are
    float32 in every other setting, too. Moves to a device reach both.

    Args:
        model: The student, with adapters or without.
    """
    buffers = [
        (part, name, value)
        for part in model.modules()
        for name, value in part._buffers.items()
        if value is not None and value.is_floating_point()
    ]
    adapters = {name: each.data for name, each in adapter_parameters(model).items()}
    yield
    for part, name, value in buffers:
        moved = part._buffers[name]
        assert moved is not None
        part._buffers[name] = value.to(moved.device)
    for name, parameter in adapter_parameters(model).items():
        parameter.data = adapters[name].to(parameter.device)
