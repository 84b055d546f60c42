"""What is checked of a run before any model is loaded, in scripts as on the command line."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import Timer

from sdft_lightning.errors import UserError, check_at_least
from sdft_lightning.files.whole_windows import check_whole_windows
from sdft_lightning.forward.memory import MemoryPlan, MemorySetting, plan_memory
from sdft_lightning.models.sharding import check_strategy, strategy_options
from sdft_lightning.modules.monitors import check_monitors
from sdft_lightning.modules.student_checks import device_memory, memory_setting
from sdft_lightning.types import TaskData

log = logging.getLogger(__name__)

# Callbacks of Lightning that cannot work here, and what to do instead.
_CALLBACKS = {
    "LearningRateFinder": "the rate is --model.optimizer.init_args.lr; try a few in short runs",
    "BatchSizeFinder": "set --data.batch_size; `preflight` measures the memory of a step",
    "Timer": "set --trainer.max_time=DD:HH:MM:SS, which waits for the end of an optimizer step",
    "GradientAccumulationScheduler": "set --trainer.accumulate_grad_batches: prompts are sampled "
    "for whole windows of one size",
    "StochasticWeightAveraging": "the teacher is the average (--model.teacher=EMATeacher)",
    "WeightAveraging": "the teacher is the average (--model.teacher=EMATeacher)",
    "EMAWeightAveraging": "the teacher is the average (--model.teacher=EMATeacher)",
    "ModelPruning": "prune the exported model",
    "BackboneFinetuning": "train adapters (--model.policy.lora.r=8), which leaves the model's own "
    "weights alone",
}
# One of these is set where a process is one of several machines'.
_CLUSTER = (
    "MASTER_ADDR",
    "NODE_RANK",
    "GROUP_RANK",
    "SLURM_NTASKS",
    "JSM_NAMESPACE_SIZE",
    "LSB_DJOB_HOSTFILE",
    "OMPI_COMM_WORLD_SIZE",
    "XRT_TPU_CONFIG",
    "KUBERNETES_PORT",
)
_BATCHES = {
    "fit": "limit_train_batches",
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}
# What a trainer keeps as it was given; an interval in hours it keeps elsewhere.
_READ_AS_GIVEN = (
    "gradient_clip_val",
    "accumulate_grad_batches",
    "overfit_batches",
    "check_val_every_n_epoch",
    "log_every_n_steps",
    "val_check_interval",
)
_MOST = 2**53  # beyond it neither numpy nor a float counts


class RunChecks:
    """Checks a run once: ahead where the command line asks, else when its module is set up.

    Args:
        module: The `PolicyModule`.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._ahead: tuple[Any, str] | None = None

    def ahead(self, trainer: Any, command: str, data: TaskData | None) -> None:
        """Check a run before the trainer begins it and writes files; `setup` does not repeat it.

        Args:
            trainer: Who will carry out the command.
            command: fit, validate, test or predict.
            data: The data module, set up; None for one that is not asked.

        Raises:
            UserError: See `check_run`.
        """
        check_run(self._module, data, trainer, command)
        self._ahead = (trainer, command)

    def at_setup(self, trainer: Any, command: str, data: TaskData | None) -> None:
        """Check a run as it is set up, unless that was done ahead; arguments as of `ahead`.

        Raises:
            UserError: See `check_run`.
        """
        if self._ahead != (trainer, command):
            check_run(self._module, data, trainer, command)
        self._ahead = None

    def forget(self) -> None:
        """Let `at_setup` check the run again."""
        self._ahead = None


def check_run(module: Any, data: TaskData | None, trainer: Any, command: str) -> None:
    """Refuse, or warn of, what cannot work.

    Args:
        module: The `PolicyModule`.
        data: The data module, set up; None for one that is not asked.
        trainer: Who carries out the command.
        command: fit, validate, test or predict.

    Raises:
        UserError: Names the option, or the row.
    """
    check_trainer(trainer, command)
    if data is not None:
        data.check_model_takes(module.new_tokens, module.evaluation.max_new_tokens)
    module.evaluator.paired.named_base()  # whether it can be read
    if command != "fit":
        return
    module.retained_rows.plan(data, trainer, command)
    module.check_before_fit([] if data is None else data.training_rows())
    if data is not None and data.batches_per_epoch is not None:
        check_whole_windows(trainer, data.batches_per_epoch)
    check_monitors(module, trainer, data)
    ends = trainer.max_steps != -1 or trainer.max_epochs not in (None, -1)
    module.schedule.check_end(ends)
    check_memory(module, data, trainer)


def check_values(options: object, name: str = "") -> None:
    """Refuse whole numbers that only Python itself can count to, and texts with NUL characters.

    Args:
        options: Nested options of a command, as mappings, namespaces and lists.
        name: What they are an option of.

    Raises:
        UserError: Names the option.
    """
    if isinstance(options, Mapping | Namespace):
        for key, value in (options if isinstance(options, Mapping) else vars(options)).items():
            check_values(value, f"{name}.{key}" if name else str(key))
    elif isinstance(options, list | tuple):
        for place, value in enumerate(options):
            check_values(value, f"{name}[{place}]")
    elif isinstance(options, int) and abs(options) > _MOST:
        raise UserError(
            f"{name}: got {str(options)[:40]}, allowed are whole numbers up to {_MOST}. Give a "
            "smaller one."
        )
    elif isinstance(options, str) and "\0" in options:
        raise UserError(f"{name}: a NUL character stands in {options[:80]!r}. Take it out.")


def check_trainer_options(options: Mapping[str, Any], command: str = "fit") -> None:
    """Refuse what would end in another library's traceback, or in a run that is none.

    Args:
        options: `trainer` of the config.
        command: What is to be done.

    Raises:
        UserError: Names the option.
    """
    check_strategy(options.get("strategy"))
    _check_callbacks(options.get("callbacks"))
    _check_numbers(options, command)
    _check_nodes(options.get("num_nodes") or 1)
    if options.get("default_root_dir") is not None:
        raise UserError(
            f"trainer.default_root_dir: got {options['default_root_dir']}; a run writes into its "
            "own folder. Use --run.root and --run.name."
        )
    clip = options.get("gradient_clip_val") or 0.0
    if clip < 0:  # torch would turn every gradient around
        raise UserError(
            f"trainer.gradient_clip_val: got {clip}, allowed are 0 (no clipping) and more."
        )
    window = options.get("accumulate_grad_batches")
    if window is not None:
        check_at_least("trainer.accumulate_grad_batches", window, 1)
    overfit = options.get("overfit_batches") or 0
    if overfit:  # Lightning puts samplers of its own into the loaders, which hold whole batches
        raise UserError(
            f"trainer.overfit_batches: got {overfit}, allowed is 0: training batches come in an "
            "order that a resumed run continues. To train on few rows set "
            "--trainer.limit_train_batches, or give data.train and data.validation a small file."
        )


def check_trainer(trainer: Any, command: str) -> None:
    """Refuse what `check_trainer_options` does, of a trainer that is there.

    Except `num_nodes`: by the time a module is asked, Lightning has waited for the other machines.

    Args:
        trainer: Lightning's Trainer.
        command: What it is to do.

    Raises:
        UserError: Names the option.
    """
    names = [*_READ_AS_GIVEN, *_BATCHES.values()]
    options = {name: getattr(trainer, name, None) for name in names}
    options["strategy"] = strategy_options(trainer.strategy)
    # A Timer is what Lightning makes of max_time.
    kinds = [type(each) for each in trainer.callbacks if not isinstance(each, Timer)]
    options["callbacks"] = [
        {"class_path": f"{kind.__module__}.{kind.__qualname__}"} for kind in kinds
    ]
    check_trainer_options(options, command)


def _check_callbacks(callbacks: Any) -> None:
    for each in callbacks if isinstance(callbacks, list) else [callbacks]:
        path = str(each.get("class_path") or "") if hasattr(each, "get") else ""
        name = path.rpartition(".")[2]
        if path.startswith("lightning.") and name in _CALLBACKS:
            raise UserError(
                f"trainer.callbacks: {name} does not work here; {_CALLBACKS[name]}. Leave it out."
            )


def _check_numbers(options: Mapping[str, Any], command: str) -> None:
    for name, least in (
        ("check_val_every_n_epoch", 1),
        ("log_every_n_steps", 0),
        ("num_sanity_val_steps", -1),
    ):
        value = options.get(name)
        if value is not None:
            check_at_least(f"trainer.{name}", value, least)
    interval = options.get("val_check_interval")
    if interval is not None and not isinstance(interval, str) and interval == 0:
        raise UserError(
            "trainer.val_check_interval: got 0, allowed are a number of micro-batches from 1, or a "
            "part of an epoch. For no validation set --trainer.limit_val_batches=0."
        )
    limit = _BATCHES.get(command, "")
    if options.get(limit) == 0:
        raise UserError(
            f"trainer.{limit}: got 0, so `{command}` would have nothing to do. Give a number of "
            "batches from 1, or a part above 0."
        )


def _check_nodes(nodes: int) -> None:
    """Refuse to wait for other machines that nobody has started."""
    if nodes > 1 and not any(name in os.environ for name in _CLUSTER):
        raise UserError(
            f"trainer.num_nodes: got {nodes}, and this process was started for one machine: it "
            "would wait for the others. Start it on each with torchrun or srun, or with "
            "MASTER_ADDR and NODE_RANK set."
        )


def check_memory(module: Any, data: TaskData | None, trainer: Any) -> None:
    """Print what memory a step takes; refuse a run that cannot fit, warn of one that may not.

    Refused is what holds more in weights, gradients, averages, teachers and copies alone than the
    GPU has free, or than the whole machine has where it trains on the CPU. Nothing is looked at
    where the model is loaded already, or processes are about to be forked, which must not have seen
    the GPU.

    Args:
        module: The `PolicyModule`.
        data: Its data module, set up; None for one that is not asked.
        trainer: Who fits.

    Raises:
        UserError: Names the options that would save memory, and how much.
    """
    device = trainer.strategy.root_device
    forks = getattr(getattr(trainer.strategy, "launcher", None), "_start_method", "") == "fork"
    if module.student is not None or (device.type == "cuda" and forks):
        return
    setting = memory_setting(module, data, trainer)
    plan, memory = plan_memory(setting), device_memory(device)
    if device.type == "cpu":  # which all processes of this machine share
        memory = memory.shared_by(trainer.num_devices)
    trainer.print(plan.table(memory.free))
    limit = memory.total if device.type == "cpu" else memory.free
    if limit is not None and plan.certain > limit:
        raise UserError(
            f"memory: {device} has {_gb(limit)}, and weights, gradients, averages, teachers and "
            f"copies alone take {_gb(plan.certain)}, whatever the rows are like. "
            f"{_advice(setting, limit)}"
        )
    if memory.free is not None and plan.peak > memory.free:
        log.warning(
            f"memory: {device} has {_gb(memory.free)} free, and a step of the longest rows takes "
            f"about {_gb(plan.peak)}. {_advice(setting, memory.free)}"
        )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _advice(setting: MemorySetting, free: int) -> str:
    """What each option would save, and which of them are enough."""
    found = remedies(setting)
    if not found:
        return "Use a smaller model, or a larger device."
    options = "; ".join(
        f"{each.option} saves {_gb(each.saved)}"
        + (f", and {_gb(each.plan.peak)} fit" if each.plan.peak <= free else "")
        for each in found
    )
    together: list[str] = []
    while plan_memory(setting).peak > free and (more := remedies(setting)):
        setting = more[0].setting
        together.append(more[0].option)
    peak = plan_memory(setting).peak
    if len(together) < 2:
        return f"What would save memory: {options}."
    outcome = f"{_gb(peak)} fit" if peak <= free else f"still {_gb(peak)}: use a smaller model, too"
    return f"What would save memory: {options}. Together ({'; '.join(together)}): {outcome}."


class Remedy(NamedTuple):
    """An option that saves memory.

    Attributes:
        option: As it is given.
        saved: Bytes.
        plan: What a step takes with it.
        setting: The run with it.
    """

    option: str
    saved: float
    plan: MemoryPlan
    setting: MemorySetting


def remedies(setting: MemorySetting) -> list[Remedy]:
    """Options that would save a hundredth or more, the one that saves most first.

    Args:
        setting: The run's.
    """
    now = plan_memory(setting)
    found = []
    for option, changed in _changes(setting):
        plan = plan_memory(changed)
        saved = max(now.peak - plan.peak, now.certain - plan.certain)
        if saved > 0.01 * now.peak:
            found.append(Remedy(option, saved, plan, changed))
    return sorted(found, key=lambda remedy: -remedy.saved)


# What AdamW in 8 bits keeps of a weight: two numbers, and for each block of 256 a scale.
_EIGHT_BIT_AVERAGES = 2 * (1 + 4 / 256)


def _changes(setting: MemorySetting) -> Iterable[tuple[str, MemorySetting]]:
    """Options that the run does not have, and the run with each."""
    sizes, alone = setting.sizes, setting.shards == 1
    if not sizes.adapters and alone and setting.optimizer != "LowMemoryAdamW":
        yield (
            "--config preset:model/low_memory behind the other files",
            replace(
                setting,
                weight_bytes=2,
                average_bytes=_EIGHT_BIT_AVERAGES,
                optimizer="LowMemoryAdamW",
                foreach=False,
                copied_bytes=0,
            ),
        )
    if not sizes.adapters and alone and sizes.small_adapters:
        adapted = sizes._replace(adapters=sizes.small_adapters)
        yield "--model.policy.lora.r=8", replace(setting, sizes=adapted, whole_copies=0)
    if sizes.adapters and setting.weight_bytes == 4:
        rounded = replace(setting, weight_bytes=2, copied_bytes=0)
        yield "--model.policy.weights_dtype=bfloat16", rounded
    if setting.foreach:
        fused = replace(setting, foreach=False, fused=True)
        yield "--model.optimizer.init_args.fused=true", fused
    if setting.copied_bytes and alone:
        yield "--model.policy.sampling_dtype=same", replace(setting, copied_bytes=0)
    if setting.engine_bytes:
        own = replace(setting, engine_bytes=0, samples=True)
        yield "--model.engine=TransformersEngine", own
    if setting.buckets:
        views = replace(setting, buckets=False, buckets_are_gradients=True)
        yield "gradient_as_bucket_view of DDPStrategy, as in preset:trainer/ddp", views
    if not setting.checkpointing and not setting.is_fused:
        again = replace(setting, checkpointing=True)
        yield "--model.policy.gradient_checkpointing=true", again
    if setting.batch > 1:
        batch = setting.batch // 2
        accumulate = -(-setting.batch * setting.accumulate // batch)
        option = f"--data.batch_size={batch} --trainer.accumulate_grad_batches={accumulate}"
        yield option, replace(setting, batch=batch, accumulate=accumulate)
