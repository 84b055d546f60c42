"""Whether the student can be trained as the run asks: on its device, spread, by this optimizer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer

from sdft_lightning.errors import UserError, printable
from sdft_lightning.forward.hidden import autocast_if_needed_
from sdft_lightning.forward.memory import MemorySetting
from sdft_lightning.forward.policy import Policy, check_model, model_sizes
from sdft_lightning.forward.probe import NotComputed
from sdft_lightning.losses.bounded import gradient_form
from sdft_lightning.losses.divergence import cross_entropy
from sdft_lightning.models.lora import ALL_LINEAR, LoRA, frozen_matrices
from sdft_lightning.models.precision import product_dtype, takes_float32
from sdft_lightning.models.sharding import check_takes_shards
from sdft_lightning.rollout.decode_mode import packing_pays
from sdft_lightning.rollout.student import has_native_bfloat16
from sdft_lightning.teacher import EMATeacher, LiveTeacher
from sdft_lightning.types import RowLengths, TaskData

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


class DeviceMemory(NamedTuple):
    """Memory of a device in bytes.

    Attributes:
        free: What this run can have; None where nobody knows.
        total: What there is; None where nobody knows.
    """

    free: int | None
    total: int | None

    def shared_by(self, processes: int) -> DeviceMemory:
        """What each of several processes can have."""
        return DeviceMemory(*(None if size is None else size // processes for size in self))


def device_memory(device: torch.device) -> DeviceMemory:
    """The memory of a device, as it is now.

    Args:
        device: Of a CPU it is what the system can give without swapping, within the limit of a
            container; of a GPU, what this process holds counts as free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(free + torch.cuda.memory_reserved(device), total)
    return _system_memory() if device.type == "cpu" else DeviceMemory(None, None)


def _system_memory() -> DeviceMemory:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        values = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
        free, total = values["MemAvailable"], values["MemTotal"] + values["SwapTotal"]
    except (OSError, ValueError, IndexError, KeyError):  # no Linux
        names = getattr(os, "sysconf_names", {})
        if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
            return DeviceMemory(None, None)
        return DeviceMemory(None, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:  # a container's own limit (cgroups, version 2)
        limit, used = (
            int(Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii"))
            for name in ("max", "current")
        )
        free = min(free, max(0, limit - used))
    except (OSError, ValueError):  # there is none
        pass
    return DeviceMemory(free, total)


def memory_setting(module: PolicyModule, data: TaskData | None, trainer: Any) -> MemorySetting:
    """What decides how much memory a step of a run takes; nothing is loaded but the config.

    Args:
        module: The module.
        data: Its data module, set up; None for one that is not asked.
        trainer: Lightning's Trainer.

    Raises:
        UserError: If there is no such model, or it cannot have the run's adapters.
    """
    policy, strategy, device = module.policy, trainer.strategy, trainer.strategy.root_device
    precision = str(trainer.precision)
    weights = 2 if "bfloat16" in (policy.weights_dtype, _TRUE.get(precision)) else 4
    stored = 2 if weights == 2 or "16" in precision else 4
    product = stored
    if stored == 2 and product_dtype(torch.bfloat16, device.type) != torch.bfloat16:
        product = 4
    spread = trainer.world_size if isinstance(strategy, ModelParallelStrategy) else 1
    setting = MemorySetting(
        sizes=model_sizes(policy),
        device=device.type,
        weight_bytes=weights,
        stored_bytes=stored,
        product_bytes=product,
        four_bits=policy.quantization is not None,
        checkpointing=policy.gradient_checkpointing,
        has_teacher=bool(module.teachers),
        averaged=any(isinstance(each, EMATeacher) for each in module.teachers.values()),
        whole_copies=_whole_copies(module),
        accumulate=trainer.accumulate_grad_batches,
        closed_form=gradient_form(getattr(module, "token_loss", cross_entropy), None) is not None,
        shards=spread,
    )
    setting = _with_rows(setting, module, data, trainer)
    setting = _with_sampler(setting, module, device)
    if type(strategy) is DDPStrategy:
        views = bool(strategy._ddp_kwargs.get("gradient_as_bucket_view"))
        setting = replace(setting, buckets=not views, buckets_are_gradients=views)
    return _with_optimizer(setting, module)


_TRUE = {"bf16-true": "bfloat16", "16-true": "bfloat16"}  # casts of the student's weights


def _whole_copies(module: PolicyModule) -> int:
    """Float32 copies of the whole model that stay as it was."""
    if module.policy.lora is not None:
        return int(hasattr(module, "original"))
    moving = (EMATeacher, LiveTeacher)
    frozen = [each for each in module.teachers.values() if not isinstance(each, moving)]
    return len(frozen) + module.retained_rows.holds_initial


def _with_rows(
    setting: MemorySetting, module: PolicyModule, data: TaskData | None, trainer: Any
) -> MemorySetting:
    """With batches and the longest texts."""
    longest = RowLengths() if data is None else data.longest_rows
    needs, given = module.row_needs, longest.demonstration
    if needs.context:
        longest, given = RowLengths(prompt=1), longest.context
    sampling = getattr(module, "sampling", None)
    answered = data is not None and trainer.limit_val_batches != 0 and data.graded("validate")
    return replace(
        setting,
        batch=1 if data is None else data.batch_size,
        completions=1 if sampling is None else sampling.completions_per_prompt,
        prompt=longest.prompt,
        teacher_prompt=longest.teacher_prompt if needs.teacher_prompt else longest.prompt,
        new_tokens=max(module.new_tokens or given, module.retained_rows.new_tokens),
        answers=data.eval_batch_size if data is not None and answered else 0,
        answer=module.evaluation.max_new_tokens,
    )


def _with_sampler(
    setting: MemorySetting, module: PolicyModule, device: torch.device
) -> MemorySetting:
    """With who samples, and with what."""
    policy, rollouts = module.policy, getattr(module, "rollouts", None)
    samples = rollouts is not None and rollouts.engine.is_trainer
    share = 0.0 if rollouts is None else rollouts.engine.device_share
    total = device_memory(device).total if share and device.type == "cuda" else None
    takes_copy = policy.sampling_dtype == "bfloat16" or (
        policy.sampling_dtype == "auto" and has_native_bfloat16(device)
    )
    copied = 2 if takes_copy and setting.weight_bytes == 4 and policy.quantization is None else 0
    if setting.shards > 1:
        copied = copied or setting.weight_bytes
    if not (samples or setting.answers):
        copied = 0
    dtype = torch.bfloat16 if 2 in (copied, setting.weight_bytes) else torch.float32
    rows = setting.rows * setting.accumulate
    lays_out = samples and setting.device == "cpu" and packing_pays(dtype, rows, setting.new_tokens)
    # See `StudentPasses`: both multiply in one dtype, and the student's own text is sampled.
    alike = product_dtype(dtype).itemsize == setting.product_bytes
    from_teacher = getattr(module, "generate_from_teacher", False)
    return replace(
        setting,
        samples=samples,
        engine_bytes=int(share * (total or 0)),
        copied_bytes=copied,
        lays_out=lays_out,
        stores_rollout=lays_out and alike and not from_teacher and setting.is_fused,
    )


def _with_optimizer(setting: MemorySetting, module: PolicyModule) -> MemorySetting:
    """With what the optimizer keeps and works with."""
    optimizer = module.trial_optimizer()
    dtype = torch.float32 if setting.trained_bytes == 4 else torch.bfloat16
    known = type(optimizer).__module__.partition(".")[0] in ("torch", "sdft_lightning")
    kept = average_bytes(module.optimizer_factory, dtype)
    options = optimizer.defaults
    fused = bool(options.get("fused"))
    at_once = options.get("foreach", False)
    if at_once is None:  # torch's choice
        at_once = setting.device == "cuda" and not fused
    return replace(
        setting,
        optimizer=type(optimizer).__name__,
        average_bytes=kept or 0.0,
        averages="exact" if known and kept is not None else "about",
        foreach=bool(at_once),
        fused=fused,
    )


def average_bytes(make: OptimizerFactory, dtype: torch.dtype) -> float | None:
    """Bytes that an optimizer keeps of each weight, from steps over two small matrices.

    Args:
        make: Called with the parameters.
        dtype: Of the weights.

    Returns:
        None where it makes no step here.
    """
    found = []
    for width in (256, 512):
        weight = nn.Parameter(torch.zeros(256, width, dtype=dtype))
        weight.grad = torch.zeros_like(weight)
        try:
            with torch.random.fork_rng(devices=[]):
                optimizer = make([weight])
                optimizer.step()
        except Exception:  # for GPUs only, or one that asks for a closure
            return None
        states = optimizer.state.values()
        found.append(sum(_bytes(value) for state in states for value in state.values()))
    return (found[1] - found[0]) / (256 * 256)


def _bytes(value: Any) -> int:
    """Of a tensor; of one that is made of others, of all of them."""
    if hasattr(value, "__tensor_flatten__"):
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
