"""AdamW for weights in bfloat16: 8-bit averages, stochastic rounding (torchao, extra low-memory).

Rounded to the nearest, most updates of bfloat16 weights are lost (METHOD §4). Rounded up or down
with the right probabilities, they arrive on average, without a float32 copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sdft_lightning.errors import extra_remedy

try:
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit
except ImportError as error:
    raise ImportError(
        f"model.optimizer: LowMemoryAdamW needs torchao. {extra_remedy('low-memory')}."
    ) from error


class LowMemoryAdamW(AdamW8bit):  # type: ignore[misc] # torchao has no types
    """torchao's AdamW8bit with what a resumable run needs.

    Its random numbers depend on (seed, optimizer step) only, not on the global generator: a resumed
    run rounds as the uninterrupted one, and replicas on several devices round alike and stay equal.
    On the CPU it runs without torch.compile, which would need a C++ compiler and minutes.

    Args:
        params: Parameters; those in bfloat16 are rounded stochastically.
        lr: Learning rate.
        betas: Rates of the averages of gradients and of their squares.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        eight_bit: Averages in 8 bits; without it in the parameters' dtype, which takes 2 bytes a
            weight more and is many times faster on a CPU.
        seed: Seed of the rounding; without it that of the run (seed_everything), 42 outside of one.

    Attributes:
        takes_shards: False: its steps fail on the sharded parameters of fsdp2.
    """

    takes_shards: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eight_bit: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bf16_stochastic_round=True,
        )
        self.eight_bit = eight_bit
        self.seed = seed  # PolicyModule fills in the run's
        for group in self.param_groups:
            group["roundings"] = 0  # in the group, so that checkpoints hold it
        # Checkpoints hold plain tensors: they load without torchao and with weights_only.
        self.register_state_dict_post_hook(_to_plain_tensors)
        self.register_load_state_dict_pre_hook(_from_plain_tensors)

    def _subclass_zeros(self, p: Tensor, signed: bool, block_size: int) -> Tensor:
        zeros: Tensor = (
            AdamW8bit._subclass_zeros(p, signed, block_size)
            if self.eight_bit
            else torch.zeros_like(p)
        )
        return zeros

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step.

        Args:
            closure: Computes the loss and the gradients.

        Returns:
            The loss of the closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        devices = {each.device for group in self.param_groups for each in group["params"]}
        roundings = self.param_groups[0]["roundings"]
        seed = 42 if self.seed is None else self.seed
        with _random_numbers_of(seed, roundings, devices), _eager_on_cpu(devices):
            super().step()
        for group in self.param_groups:
            group["roundings"] = roundings + 1
        return loss


def _to_plain_tensors(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        place: {
            name: {"codes": value.codes, "scale": value.scale, "signed": value.signed}
            if isinstance(value, OptimState8bit)
            else value
            for name, value in of_parameter.items()
        }
        for place, of_parameter in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _from_plain_tensors(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        place: {
            name: _eight_bit(value) if isinstance(value, dict) else value
            for name, value in of_parameter.items()
        }
        for place, of_parameter in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _eight_bit(plain: dict[str, Any]) -> Tensor:
    codes, scale, signed = plain["codes"], plain["scale"], plain["signed"]
    table = OptimState8bit.zeros((256,), signed, 256, codes.device).qmap
    state: Tensor = OptimState8bit(codes, scale, table, signed)
    return state


@contextmanager
def _random_numbers_of(seed: int, step: int, devices: set[torch.device]) -> Iterator[None]:
    """The same random numbers for the same seed and step; the global generators are put back."""
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
        yield


@contextmanager
def _eager_on_cpu(devices: set[torch.device]) -> Iterator[None]:
    if all(device.type == "cpu" for device in devices):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
