"""Models whose parameters are spread over processes (FSDP2), and Lightning's strategies by name.

A forward pass of a sharded model is a sequence of collectives, so every process must make the same
passes in the same order. Training does (`layout.can_share` says no to extra passes); sampling and
evaluation, where each process goes on for as long as its own rows do, run on a whole local copy.

Importing this file makes "fsdp2" a name that Trainer(strategy=...) takes. All modules for training
import it; a script that has imported none of them yet, before it makes its Trainer, imports this.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import (
    ModelParallelStrategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

from sdft_lightning.errors import UserError


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are spread over processes."""
    return isinstance(next(model.parameters(), None), DTensor)


def data_parallel_mesh(mesh: Any) -> Any:
    """The part of Lightning's device mesh that parameters are cut along.

    Args:
        mesh: `LightningModule.device_mesh` of ModelParallelStrategy.

    Raises:
        UserError: If a second part asks for tensor parallelism.
    """
    size = mesh["tensor_parallel"].size()
    if size > 1:
        raise UserError(
            f"trainer.strategy: tensor_parallel_size is {size}, allowed is 1: models are cut by "
            "parameters (FSDP2) only. Give --trainer.strategy=fsdp2, which takes all devices."
        )
    return mesh["data_parallel"]


def check_takes_shards(optimizer: Any) -> None:
    """Refuse an optimizer that says that it does not work on sharded parameters.

    Args:
        optimizer: One with `takes_shards = False`; one that says nothing passes.

    Raises:
        UserError: If it does not.
    """
    if not getattr(optimizer, "takes_shards", True):
        raise UserError(
            f"model.optimizer: got {type(optimizer).__name__}, which does not work on parameters "
            "that fsdp2 has spread over processes; allowed is one that does, such as AdamW. Give "
            "--model.optimizer=torch.optim.AdamW, or keep the optimizer with "
            "--trainer.strategy=ddp."
        )


def shard_(network: Any, mesh: Any) -> None:
    """Cut a model along a mesh, one group of parameters for each transformer block.

    The outermost group is the base model and not the whole: hidden states are asked of the base
    model, and FSDP gathers when the module that it was given is called.

    Args:
        network: A causal language model of transformers; changed in place.
        mesh: One-dimensional device mesh.

    Raises:
        UserError: If the model does not name its blocks, or has parameters elsewhere.
    """
    kinds = set(getattr(network, "_no_split_modules", None) or [])
    blocks = [part for part in network.base_model.modules() if type(part).__name__ in kinds]
    if not blocks:
        raise UserError(
            f"trainer.strategy: {type(network).__name__} does not say which of its modules are "
            "transformer blocks (_no_split_modules), so fsdp2 cannot cut it. Use ddp."
        )
    head = network.get_output_embeddings()
    tied = head.weight is network.get_input_embeddings().weight
    parts = [*blocks, network.base_model]
    # A tied weight belongs to the embedding's group; the head gets the cut one from there.
    parts += [] if tied and head.bias is None else [head]
    for part in parts:
        # Nothing stays whole after a forward pass: the teacher's average is moved shard by shard.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        if mesh.device_type == "cpu":
            part.set_force_sum_reduction_for_comms(True)  # gloo sums, it cannot average
    if tied:
        head.weight = network.get_input_embeddings().weight
    whole = [name for name, value in network.named_parameters() if not isinstance(value, DTensor)]
    if whole:
        raise UserError(
            f"trainer.strategy: fsdp2 does not know where {type(network).__name__} uses "
            f"{whole[0]}. Use ddp."
        )


def gathered(tensor: Tensor) -> Tensor:
    """A whole tensor from its shards, the same on every process; others stay as they are.

    Differentiable: each shard gets the mean over processes of the whole's gradients, as FSDP
    averages those of all other parameters.

    Args:
        tensor: A parameter. All processes must ask for it at the same time.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    whole: Tensor = tensor.full_tensor(grad_placements=[Partial()])
    if whole.requires_grad:
        # `Partial` sums. Scaled rather than `Partial("avg")`, which gloo does not have.
        whole = _ScaleGradient.apply(whole, 1.0 / mesh.size())  # type: ignore[no-untyped-call]
    return whole


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient scaled."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        """Return the tensor."""
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        return grad_outputs[0] * ctx.factor, None


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, in the same storage; others stay as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def summed(values: Tensor, model: nn.Module) -> Tensor:
    """Sums over shards as sums over the whole: added up over processes if the model is sharded."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor):
        values = values.to(parameter.device)
        dist.all_reduce(values, group=parameter.device_mesh.get_group())
    return values


def empty_copy(network: nn.Module) -> Any:
    """A copy without memory for parameters, to be filled by `fill_`; made before `shard_`.

    Args:
        network: A model that is not sharded; a sharded one cannot be copied.
    """
    # What deepcopy finds in its memo it does not copy. Buffers, which FSDP leaves whole, it does.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().new_empty(0), requires_grad=False)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, memo).eval()


@torch.no_grad()
def fill_(target: nn.Module, network: nn.Module, dtype: torch.dtype | None) -> None:
    """Gather all parameters of a sharded model into a whole copy; all processes at once.

    Args:
        target: What `empty_copy` made of the model.
        network: The sharded model.
        dtype: Of the copy; None keeps the model's.
    """
    for mine, theirs in zip(target.parameters(), network.parameters(), strict=True):
        whole = gathered(theirs).to(dtype or theirs.dtype)
        if mine.numel() == 0:
            # On one process the gathered tensor may be the shard itself.
            mine.data = whole.clone() if whole.data_ptr() == local(theirs).data_ptr() else whole
        else:
            mine.copy_(whole)


def whole_state_dict(network: nn.Module) -> dict[str, Any]:
    """All weights of a sharded model, on the CPU of rank zero; empty on the others.

    Args:
        network: The sharded model. All processes must ask at the same time.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(network, options=options))


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
        UserError: For FSDP 1, DeepSpeed, or sharded files.
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
    if "deepspeed" in name.lower():
        raise UserError(
            f"trainer.strategy: got {name}; DeepSpeed is not supported. Its stage 3 has weights in "
            "forward calls only, while the loss, the teacher and sampling need them outside of "
            "these, and its other stages spread less. Use --trainer.strategy=fsdp2."
        )


def strategy_options(strategy: Any) -> dict[str, Any]:
    """A trainer's strategy as `check_strategy` reads it.

    Args:
        strategy: One of Lightning's.
    """
    given: dict[str, Any] = {}
    if isinstance(strategy, ModelParallelStrategy):
        given["save_distributed_checkpoint"] = strategy._save_distributed_checkpoint
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
