"""Lightning strategies by name: FSDP2 over all devices; what is asked of DeepSpeed.

Importing this file makes "fsdp2" a name that Trainer(strategy=...) takes. All modules for training
import it; a script that has imported none of them yet, before it makes its Trainer, imports this.
"""

from __future__ import annotations

from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from torch.distributed.constants import default_pg_timeout

from sdft_lightning.errors import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over all devices of all nodes, one file a checkpoint.

    Args:
        process_group_backend: nccl or gloo; by the device without it.
        timeout: How long a process waits for the others.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,  # `export` and resume read one file
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Take all processes: Lightning's `auto` would be one for each node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Parameters of student and teacher spread over processes"
)


def check_strategy(strategy: Any) -> None:
    """Refuse, before anything is loaded, strategies that cannot work.

    Args:
        strategy: `trainer.strategy` of the config: a name, or a mapping with `class_path`.

    Raises:
        UserError: For FSDP 1, DeepSpeed's stage 3, DeepSpeed without its extra, or sharded files.
    """
    name, options = _name(strategy), _options(strategy)
    if name == "fsdp" or name.startswith("fsdp_") or name.endswith("FSDPStrategy"):
        raise UserError(
            f"trainer.strategy: {name} is FSDP 1, which hides parameters from everything but a "
            "forward call. Use --trainer.strategy=fsdp2."
        )
    if name.endswith("ModelParallelStrategy") and options.get("save_distributed_checkpoint", True):
        raise UserError(
            "trainer.strategy: save_distributed_checkpoint is true, allowed is false: `export` and "
            "--ckpt_path read one file. Use --trainer.strategy=fsdp2, which sets it."
        )
    if "deepspeed" not in name.lower():
        return
    stage = options.get("stage", 3 if "stage_3" in name else 2)
    if stage == 3 or options.get("config") is not None:
        raise UserError(
            f"trainer.strategy: got {name} with stage {stage}; of DeepSpeed, stages 1 and 2 are "
            "allowed, without a config file. Stage 3 has weights in forward calls only, and the "
            "loss, the teacher and sampling need them outside of these. "
            "Use --trainer.strategy=fsdp2, which spreads the same."
        )
    if find_spec("deepspeed") is None:
        raise UserError(
            "trainer.strategy: DeepSpeed is not installed. Install the extra: "
            "pip install 'sdft-lightning[deepspeed]'."
        )


def strategy_options(strategy: Any) -> dict[str, Any]:
    """A trainer's strategy as `check_strategy` reads it.

    Args:
        strategy: One of Lightning's.
    """
    given: dict[str, Any] = {}
    if isinstance(strategy, ModelParallelStrategy):
        given["save_distributed_checkpoint"] = strategy._save_distributed_checkpoint
    if isinstance(strategy, DeepSpeedStrategy):
        given["stage"] = 3 if strategy.zero_stage_3 else 2
    return {"class_path": type(strategy).__qualname__, "init_args": given}


def _name(strategy: Any) -> str:
    if isinstance(strategy, str):
        return strategy
    return str(strategy["class_path"]) if _is_mapping(strategy) else ""


def _options(strategy: Any) -> dict[str, Any]:
    return dict(strategy.get("init_args") or {}) if _is_mapping(strategy) else {}


def _is_mapping(strategy: Any) -> bool:
    # jsonargparse's namespaces have `get`; a strategy object of a Python caller has not.
    return hasattr(strategy, "get") and strategy.get("class_path") is not None
