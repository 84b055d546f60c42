"""The teacher: a copy of the student that sees the demonstration.

It is always in eval mode, never sees a gradient, keeps its weights in float32 whatever the
student trains in, shares no storage with it, and is part of checkpoints.

Where the student trains adapters (LoRA), its frozen weights are not held twice: the teacher stands
on the same parameters, without adapters (frozen) or with float32 adapters of its own (EMA).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from sdft_lightning.errors import UserError
from sdft_lightning.forward.hidden import PromptCache, completion_hidden_states, output_head
from sdft_lightning.models.lora import (
    base_copy,
    effective_weights,
    is_adapted,
    sharing_copy,
    trained_parameters,
)
from sdft_lightning.models.precision import eval_mode
from sdft_lightning.models.sharding import local, shard_, summed
from sdft_lightning.types import OutputHead, Tokens


class Teacher(nn.Module):
    """What all teachers have in common. `model` is None until `copy_from` was called.

    Attributes:
        shares_weights: Whether the model stands on frozen weights of the student; they are then
            left out of checkpoints.
    """

    model: nn.Module | None
    _copy_of = staticmethod(sharing_copy)

    def __init__(self) -> None:
        super().__init__()
        self.model = None
        self.shares_weights = False
        self._cache: PromptCache | None = None
        self.eval()

    def copy_from(self, student: nn.Module) -> None:
        """Become a copy of the student, in float32 and in storage of its own.

        Args:
            student: A causal language model of transformers, with adapters or without.
        """
        self.hold(self._copy_of(student), {id(parameter) for parameter in student.parameters()})
        self.shares_weights = is_adapted(student)

    def hold(self, model: nn.Module, shared: Collection[int] = ()) -> None:
        """Keep a model, in float32 and without gradients.

        Args:
            model: A causal language model of transformers; it is changed in place.
            shared: `id` of the parameters that it shares with the student, which stay as they are.
        """
        for parameter in model.parameters():
            if id(parameter) not in shared:
                parameter.requires_grad_(False)
                parameter.grad = None
                parameter.data = parameter.data.float()
        self.model = model.eval()
        self.shares_weights = False

    def shard_(self, mesh: Any) -> None:
        """Spread the weights over processes as the student's are.

        Args:
            mesh: One-dimensional device mesh.
        """
        if self.model is not None:
            shard_(self.model, mesh)

    @torch.no_grad()
    def update_(self, student: nn.Module, step: int) -> None:
        """Move after an optimizer step; a frozen teacher stays.

        Args:
            student: The model after the step.
            step: Number of optimizer steps taken, from 1.
        """

    @torch.no_grad()
    def forward(self, prompts: Tokens, completions: Tokens, keep: Tensor) -> Tensor:
        """Hidden states `(N, D)` at the kept tokens, see `completion_hidden_states`."""
        return completion_hidden_states(self.network, prompts, completions, keep, cache=self._cache)

    @property
    def is_loaded(self) -> bool:
        """Whether there is a model that answers."""
        return self.model is not None

    @property
    def network(self) -> Any:
        """The model that answers.

        Raises:
            RuntimeError: Before `copy_from`.
        """
        if self.model is None:
            raise RuntimeError("The teacher has no model yet: call copy_from(student) first.")
        return self.model

    def gather_head(self) -> OutputHead:
        """The teacher's output head; a teacher in shards takes all processes at once."""
        return output_head(self.network)

    @torch.no_grad()
    def distance(self, student: nn.Module) -> float:
        """‖teacher − student‖ / ‖student‖ over all weights, adapters added; 0 for the same ones."""
        mine, theirs = effective_weights(self.network), effective_weights(student)
        _check_names(mine, theirs)
        apart = torch.zeros((), dtype=torch.float64)
        size = torch.zeros((), dtype=torch.float64)
        for name, read in theirs.items():
            weight = local(read())
            apart += (local(mine[name]()) - weight).square().sum().double().cpu()
            size += weight.square().sum().double().cpu()
        sums = summed(torch.stack([apart, size]), student)  # (2,)
        return float((sums[0] / sums[1]).sqrt())

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        """Follow a move to a device, but not a cast: `module.to(bfloat16)` leaves float32."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class FrozenTeacher(Teacher):
    """The model as it was before training.

    Args:
        cache_prompts: Keep the keys and values of every teacher prompt in memory, so that after
            the first epoch only completions are computed. Costs layers · 2 · key-value heads ·
            head size · 4 bytes for each token of all teacher prompts.
    """

    _copy_of = staticmethod(base_copy)

    def __init__(self, cache_prompts: bool = False) -> None:
        super().__init__()
        self._cache = PromptCache() if cache_prompts else None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def hold(self, model: nn.Module, shared: Collection[int] = ()) -> None:
        """Keep a model, and forget what the former one had computed."""
        super().hold(model, shared)
        self.forget()

    def shard_(self, mesh: Any) -> None:
        """Spread the teacher over processes (FSDP2).

        Args:
            mesh: One-dimensional device mesh.

        Raises:
            UserError: If prompts are to be cached.
        """
        if self._cache is not None:
            raise UserError(
                "teacher.cache_prompts: got true, allowed under fsdp2 is false: a process that "
                "finds its prompts in the cache makes a pass less than the others, which would "
                "wait for it. Set it to false, or use ddp."
            )
        super().shard_(mesh)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        """A move to another device leaves the cache behind."""
        self.forget()
        return super()._apply(fn, recurse)

    def forget(self) -> None:
        """Empty the cache, after the weights were changed from outside."""
        if self._cache is not None:
            self._cache = PromptCache()


def _forget(module: nn.Module, _: object) -> None:
    """After weights were loaded, what the former ones computed is void."""
    assert isinstance(module, FrozenTeacher)
    module.forget()


class EMATeacher(Teacher):
    """An exponential moving average of the student: φ ← (1 − r) φ + r θ (METHOD §1).

    Args:
        update_rate: r, the weight of the student; 0.01 to 0.05 in the paper.
        every: Optimizer steps between two updates.
    """

    def __init__(self, update_rate: float = 0.01, every: int = 1) -> None:
        super().__init__()
        if not 0 < update_rate <= 1:
            raise UserError(
                f"teacher.update_rate: got {update_rate}, allowed is 0 < update_rate <= 1 (the "
                "weight of the student). For a teacher that never moves choose FrozenTeacher."
            )
        if every < 1:
            raise UserError(f"teacher.every: got {every}, allowed are 1 and more.")
        self.update_rate = update_rate
        self.every = every

    @torch.no_grad()
    def update_(self, student: nn.Module, step: int) -> None:
        """Move toward the student, if `step` is a multiple of `every`."""
        if step % self.every == 0:
            mine, theirs = trained_parameters(self.network), trained_parameters(student)
            _check_names(mine, theirs)
            for name, average in mine.items():
                ema_(local(average), local(theirs[name]), self.update_rate)


class LiveTeacher(Teacher):
    """The student itself, in eval mode and without gradient. The paper's ablation: it collapses.

    It has no weights of its own, hence nothing in checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self._student: list[nn.Module] = []  # in a list, so that it is no submodule

    def copy_from(self, student: nn.Module) -> None:
        """Keep a reference to the student; nothing is copied."""
        self._student = [student]

    @property
    def is_loaded(self) -> bool:
        """Whether it knows its student."""
        return bool(self._student)

    @property
    def network(self) -> Any:
        """The student.

        Raises:
            RuntimeError: Before `copy_from`.
        """
        if not self._student:
            raise RuntimeError("The teacher has no model yet: call copy_from(student) first.")
        return self._student[0]

    @torch.no_grad()
    def forward(self, prompts: Tokens, completions: Tokens, keep: Tensor) -> Tensor:
        """Hidden states at kept completion tokens, `(N, D)`, of the student put into eval mode."""
        with eval_mode(self.network):
            return super().forward(prompts, completions, keep)


@torch.no_grad()
def ema_(average: Tensor, value: Tensor, rate: float) -> None:
    """Average ← (1 − rate) · average + rate · value, in place and in the average's dtype."""
    average.lerp_(value.to(average.dtype), rate)


def _check_names(teacher: Collection[str], student: Collection[str]) -> None:
    """Refuse a model whose weights are not those of the teacher.

    Raises:
        UserError: If the names differ.
    """
    odd = sorted(set(teacher) ^ set(student))[:3]
    if odd:
        raise UserError(f"teacher: its parameters are not the student's, e.g. {odd}.")
