"""The policy: a causal language model made ready for training, with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from sdft_lightning.errors import UserError
from sdft_lightning.forward.forward_paths import find_paths, name_decoder_
from sdft_lightning.forward.hidden import check_output_head
from sdft_lightning.models.lora import (
    LoRA,
    adapter_parameters,
    add_adapter_,
    check_adapters_are_called,
)
from sdft_lightning.models.precision import Quantization, quantization_options
from sdft_lightning.models.randomness import check_no_randomness, turn_off_randomness_
from sdft_lightning.models.tokenization import (
    check_attention,
    check_causal,
    load_config,
    load_stop_ids,
    load_tokenizer,
    resolve_model,
    unloadable,
)

WeightsDtype = Literal["float32", "bfloat16"]


class Policy(NamedTuple):
    """A model with what belongs to it.

    Attributes:
        model: A causal language model of transformers, without randomness, in train mode.
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
    check: bool = True,
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
        check: Call `check_model` at once; whoever knows the precision of the run does so later.

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
    stops = load_stop_ids(model_name, tokenizer, revision)
    check_vocabulary(model, stops, model_name)
    turn_off_randomness_(model)
    name_decoder_(model)  # before any copy is made
    if lora is not None:
        add_adapter_(model, lora, seed)
    if gradient_checkpointing:
        if lora is not None:
            # Else reentrant checkpoints see no input with gradient below the first adapter.
            # transformers 5.23 does it by itself.
            model.enable_input_require_grads()
        # Renamed in the course of transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    model.train()
    if check:
        check_model(model)
    return Policy(model, tokenizer, stops)


def _load_model(
    model_name: str,
    revision: str | None,
    weights_dtype: WeightsDtype,
    options: dict[str, Any],
) -> Any:
    from transformers import AutoModelForCausalLM

    check_attention(options.get("attn_implementation"), "model.attn_implementation")
    config = load_config(model_name, revision)
    check_causal(model_name, revision)
    check_attention(getattr(config, "_attn_implementation", None), f"model_name: {model_name}")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_model(model_name),
            revision=revision,
            dtype=getattr(torch, weights_dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    except Exception as error:  # transformers fails in many ways on folders that are not whole
        raise unloadable("model", model_name, error) from error
    model, report = loaded
    if report["mismatched_keys"]:
        name, saved, wanted = sorted(report["mismatched_keys"], key=str)[0]
        raise UserError(
            f"model_name: {len(report['mismatched_keys'])} tensors in the weights of {model_name} "
            f"have other sizes than its config.json says, e.g. {name}: {tuple(saved)} instead of "
            f"{tuple(wanted)}. Use weights and config of the same model."
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"model_name: the weights of {model_name} lack {len(missing)} tensors, e.g. "
            f"{missing[0]}, which would be drawn at random. Use a complete folder."
        )
    return model


def check_vocabulary(model: Any, ends: list[int], model_name: str) -> None:
    """Refuse a model that cannot sample a stop token; other ids are checked where they occur.

    Args:
        model: A causal language model of transformers.
        ends: The stop ids.
        model_name: As the user gave it.

    Raises:
        UserError: If all of them are out of range.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if min(ends) >= rows:
        raise UserError(
            f"model_name: answers of {model_name} end with token ids {ends}, and the model has "
            f"only {rows} embeddings. Use the tokenizer that belongs to the model."
        )


def check_model(model: Any) -> None:
    """Find out by computing a few tokens whether a model can be trained here.

    Call it on the device and in the precision of the run: some attention kernels take no others.

    Args:
        model: A causal language model of transformers, not spread over processes.

    Raises:
        UserError: If it is no causal model of token ids, its logits are not those that the loss
            forms, it is random in training, or it reads weights past their adapters.
    """
    find_paths(model)
    check_adapters_are_called(model)
    check_output_head(model)
    check_no_randomness(model)


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
