"""The policy: a causal language model made ready for training, with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from sdft_lightning.errors import UserError, check_choice
from sdft_lightning.forward.forward_paths import find_paths, name_decoder_
from sdft_lightning.forward.fused import DecodingKind, choose_decoding_, is_known_kind
from sdft_lightning.forward.hidden import check_output_head
from sdft_lightning.models.lora import (
    LoRA,
    adapter_parameters,
    add_adapter_,
    check_adapters_are_called,
    count_adapter_weights,
)
from sdft_lightning.models.precision import Quantization, quantization_options
from sdft_lightning.models.randomness import check_no_randomness, turn_off_randomness_
from sdft_lightning.models.tokenization import (
    check_attention,
    check_causal,
    config_value,
    load_config,
    load_stop_ids,
    load_tokenizer,
    resolve_model,
    unloadable,
)

WeightsDtype = Literal["float32", "bfloat16"]
SamplingDtype = Literal["auto", "same", "bfloat16"]


@dataclass(frozen=True)
class Policy:
    """Which model is trained, in which form.

    Args:
        name: `embedded`, a folder written by save_pretrained, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        weights_dtype: Dtype of the trained weights; bfloat16 starves small updates.
        attn_implementation: Passed to transformers, e.g. sdpa or flash_attention_2.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        lora: Train low-rank adapters only (needs the extra `lora`), e.g. --model.policy.lora.r=8.
        quantization: Keep what is frozen below the adapters in 4 bits, nf4 or fp4; on CUDA devices
            (needs the extra `qlora`).
        sampling_dtype: Weights to sample with, in training and in evaluation: same, a bfloat16
            copy, or auto (the copy where the hardware multiplies bfloat16).
        decoding: How tokens are sampled on a CUDA device by models of the Llama kind: graphs (own
            steps, replayed as CUDA graphs), eager (the same without graphs), or transformers.
    """

    name: str = "embedded"
    revision: str | None = None
    weights_dtype: WeightsDtype = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    lora: LoRA | None = None
    quantization: Quantization | None = None
    sampling_dtype: SamplingDtype = "auto"
    decoding: DecodingKind = "graphs"

    def __post_init__(self) -> None:
        """Refuse unknown dtypes, and 4-bit weights that would have to be trained themselves."""
        check_choice("model.policy.weights_dtype", self.weights_dtype, get_args(WeightsDtype))
        check_choice("model.policy.sampling_dtype", self.sampling_dtype, get_args(SamplingDtype))
        check_choice("model.policy.decoding", self.decoding, get_args(DecodingKind))
        if self.quantization is not None and self.lora is None:
            raise UserError(
                f"model.policy.quantization: got {self.quantization} without model.policy.lora; "
                "4-bit weights cannot be trained. Set model.policy.lora (e.g. "
                "--model.policy.lora.r=8), or leave quantization out."
            )


class LoadedPolicy(NamedTuple):
    """A model with what belongs to it.

    Attributes:
        model: A causal language model of transformers, without randomness, in train mode.
        tokenizer: Its tokenizer.
        stop_ids: Ids of which any ends a completion.
    """

    model: Any
    tokenizer: Any
    stop_ids: list[int]


def load_policy(policy: Policy, seed: int = 42, check: bool = True) -> LoadedPolicy:
    """Load a policy; safetensors only, and never code from the Hub.

    Args:
        policy: Which model, in which form.
        seed: Adapters are drawn with it.
        check: Call `check_model` at once; whoever knows the precision of the run does so later.

    Raises:
        UserError: If there is no such model, or it is not one that can be trained here.
    """
    model = _load_model(policy)
    tokenizer = load_tokenizer(policy.name, policy.revision)
    stops = load_stop_ids(policy.name, tokenizer, policy.revision)
    check_vocabulary(model, stops, policy.name)
    turn_off_randomness_(model)
    name_decoder_(model)  # before any copy is made
    choose_decoding_(model, policy.decoding)
    if policy.lora is not None:
        add_adapter_(model, policy.lora, seed)
    if policy.gradient_checkpointing:
        if policy.lora is not None:
            # Else reentrant checkpoints see no input with gradient below the first adapter.
            # transformers 5.23 does it by itself.
            model.enable_input_require_grads()
        # Renamed in the course of transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    model.train()
    if check:
        check_model(model)
    return LoadedPolicy(model, tokenizer, stops)


def _load_model(policy: Policy) -> Any:
    from transformers import AutoModelForCausalLM

    options = quantization_options(policy.quantization)
    if policy.attn_implementation is not None:
        options["attn_implementation"] = policy.attn_implementation
    _checked_config(policy)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_model(policy.name),
            revision=policy.revision,
            dtype=getattr(torch, policy.weights_dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    except Exception as error:  # transformers fails in many ways on folders that are not whole
        raise unloadable("model", policy.name, error) from error
    model, report = loaded
    if report["mismatched_keys"]:
        name, saved, wanted = sorted(report["mismatched_keys"], key=str)[0]
        raise UserError(
            f"model.policy.name: {len(report['mismatched_keys'])} tensors in the weights of "
            f"{policy.name} have other sizes than its config.json says, e.g. {name}: "
            f"{tuple(saved)} instead of {tuple(wanted)}. Use weights and config of the same model."
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"model.policy.name: the weights of {policy.name} lack {len(missing)} tensors, e.g. "
            f"{missing[0]}, which would be drawn at random. Use a complete folder."
        )
    return model


def _checked_config(policy: Policy) -> Any:
    """The config of a policy's model.

    Raises:
        UserError: If there is no such model, or it is not one that is trained here.
    """
    check_attention(policy.attn_implementation, "model.policy.attn_implementation")
    config = load_config(policy.name, policy.revision)
    check_causal(policy.name, policy.revision)
    check_attention(
        getattr(config, "_attn_implementation", None), f"model.policy.name: {policy.name}"
    )
    return config


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
            f"model.policy.name: answers of {model_name} end with token ids {ends}, and the model "
            f"has only {rows} embeddings. Use the tokenizer that belongs to the model."
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


_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "intermediate_size",
    "head_dim",
)


class ModelSizes(NamedTuple):
    """Sizes of a model, counted on a model without memory.

    Attributes:
        weights: All parameters; tied ones count once.
        linear: Those of the linear layers but the head.
        head: V · D, those of the output head.
        largest: Those of the largest parameter.
        adapters: Of the run's adapters; 0 without.
        small_adapters: Of adapters of rank 8 on all linear layers; 0 where there can be none.
        layers: L.
        width: D.
        inner: F, the width of the MLP.
        queries: H · E, heads times their size.
        keys: K · E, heads of keys times their size.
        vocabulary: V.
        is_known: Whether fused blocks know the architecture.
        tied: Whether the head is the embedding.
    """

    weights: int
    linear: int
    head: int
    largest: int
    adapters: int
    small_adapters: int
    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    is_known: bool
    tied: bool = False


def model_sizes(policy: Policy) -> ModelSizes:
    """Count a policy's parameters from its config, without memory for them.

    Args:
        policy: Which model, in which form.

    Raises:
        UserError: If there is no such model, or it cannot have these adapters.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = _checked_config(policy)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise unloadable("model", policy.name, error) from error
    head = model.get_output_embeddings()
    kinds = nn.Linear | Conv1D
    linear = [part for part in model.modules() if isinstance(part, kinds) and part is not head]
    counts = [parameter.numel() for parameter in model.parameters()]
    given = {name: config_value(config, name) for name in _SIZES}
    known = {name: size for name, size in given.items() if isinstance(size, int)}
    table = model.get_input_embeddings().weight  # (V, D)
    width, heads = known.get("hidden_size", table.shape[1]), known.get("num_attention_heads", 1)
    size = known.get("head_dim", width // heads)
    sizes = ModelSizes(
        weights=sum(counts),
        linear=sum(part.weight.numel() for part in linear),
        head=0 if head is None else head.weight.numel(),
        largest=max(counts),
        adapters=0,
        small_adapters=8 * sum(sum(part.weight.shape) for part in linear),
        layers=known.get("num_hidden_layers", 1),
        width=width,
        inner=known.get("intermediate_size", 4 * width),
        queries=heads * size,
        keys=known.get("num_key_value_heads", heads) * size,
        vocabulary=table.shape[0] if head is None else head.weight.shape[0],
        is_known=is_known_kind(model.base_model),
        tied=head is not None and head.weight is table,
    )
    if policy.lora is None:
        return sizes
    return sizes._replace(adapters=count_adapter_weights(model, policy.lora))
