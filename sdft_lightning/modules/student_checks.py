"""Whether the student can be trained as the run asks: on its device, spread, by this optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from sdft_lightning.errors import UserError, printable
from sdft_lightning.forward.hidden import autocast_if_needed_
from sdft_lightning.forward.policy import Policy, check_model
from sdft_lightning.forward.probe import NotComputed
from sdft_lightning.models.lora import ALL_LINEAR, LoRA, frozen_matrices
from sdft_lightning.models.precision import product_dtype, takes_float32
from sdft_lightning.models.sharding import check_takes_shards
from sdft_lightning.rollout.student import has_native_bfloat16

if TYPE_CHECKING:
    from sdft_lightning.modules.base import PolicyModule

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


def check_student(module: PolicyModule) -> None:
    """Compute a few tokens with the student, on the device and in the precision of the run.

    Args:
        module: Its models are loaded and on their device.

    Raises:
        UserError: See `check_model`.
    """
    trainer, student = module.trainer, module.student
    with trainer.precision_plugin.forward_context():
        try:
            check_model(student)
        except Exception as error:  # attention kernels refuse in their own words
            told = isinstance(error, UserError) and not isinstance(error, NotComputed)
            if told or takes_float32(student):
                raise
            kernel = student.config._attn_implementation
            raise UserError(
                f"model.policy.attn_implementation: {kernel} cannot compute with "
                f"trainer.precision {trainer.precision} on {module.device}: {error}. Use "
                "--trainer.precision=bf16-mixed (flash attention takes half precision on a GPU "
                "only), or --model.policy.attn_implementation=sdpa."
            ) from error
        for teacher in module.teachers.values():
            if teacher.is_loaded and teacher.network is not student:
                autocast_if_needed_(teacher.network)


def check_can_shard(policy: Policy, optimizer: Optimizer | None) -> None:
    """Refuse what cannot be spread over processes (FSDP2).

    Args:
        policy: Which model, in which form.
        optimizer: What trains it; None where nothing does.

    Raises:
        UserError: With adapters, whose teacher shares the frozen weights, or an optimizer that
            cannot train what is spread.
    """
    if optimizer is not None:
        check_takes_shards(optimizer)
    if policy.lora is not None:
        raise UserError(
            "model.policy.lora: adapters under fsdp2 are not supported, since student and "
            "teacher share the frozen weights. Use --trainer.strategy=ddp, or train without "
            "adapters."
        )


def trial_optimizer(make: OptimizerFactory) -> Optimizer:
    """The optimizer over a parameter of no meaning; of a matrix, which all optimizers take.

    Args:
        make: Called with the parameters.
    """
    return make([nn.Parameter(torch.zeros(1, 1))])


def check_optimizer(make: OptimizerFactory) -> None:
    """Refuse an optimizer that cannot train a language model.

    Args:
        make: Called with the parameters.

    Raises:
        UserError: If it refuses its options, or takes no gradients of ours.
    """
    try:
        optimizer = trial_optimizer(make)
    except ValueError as error:
        raise UserError(
            f"model.optimizer: it refuses its options: {printable(str(error))}. Correct "
            "--model.optimizer."
        ) from error
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError(
            "model.optimizer: SparseAdam takes sparse gradients only, which no language model "
            "has here. Use --model.optimizer=torch.optim.AdamW."
        )


def adapter_report(student: Any, lora: LoRA) -> list[str]:
    """What a run with adapters tells as it starts, in lines.

    Args:
        student: With its adapters.
        lora: Their options.
    """
    trained = student.num_parameters(only_trainable=True)
    total = student.num_parameters()
    lines = [f"LoRA: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"]
    frozen = frozen_matrices(student)
    if frozen and lora.target_modules == ALL_LINEAR:
        kinds = ", ".join(f"{kind} ({len(names)})" for kind, names in frozen.items())
        lines.append(f"LoRA: all-linear leaves these matrices frozen: {kinds}")
    return lines


def warn_of_slow_precision(precision: str, device: torch.device, weights: torch.dtype) -> None:
    """Warn where bfloat16 saves no time, or costs some.

    Args:
        precision: Lightning's name, e.g. bf16-mixed.
        device: Where the run computes.
        weights: Dtype of the student's weights, those below adapters if there are any.
    """
    rounded = weights == torch.bfloat16
    if has_native_bfloat16(device) or not (rounded or precision.startswith("bf16")):
        return
    asked = f"trainer.precision: {precision}"
    if rounded and not precision.startswith("bf16"):
        asked = "model.policy.weights_dtype: bfloat16"
    outcome = "where a step takes longer than in float32, with some processors several times"
    if product_dtype(torch.bfloat16, device.type) == torch.float32:
        outcome = "so that products are made in float32 and a step is no faster than with 32-true"
        if rounded:
            outcome += (
                ". Models other than Llama, Qwen2 and Qwen3, and these with adapters or activation "
                "checkpointing, are multiplied in bfloat16, which takes several times as long"
            )
    remedies = ["--trainer.precision=32-true"] if precision.startswith("bf16") else []
    remedies += ["--model.policy.weights_dtype=float32"] if rounded else []
    warnings.warn(
        f"{asked} on a {device.type} device without bfloat16 arithmetic, {outcome}. "
        f"Use {' and '.join(remedies)} unless memory is short.",
        stacklevel=2,
    )
