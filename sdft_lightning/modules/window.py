"""An accumulation window: what is logged of it, its seconds, and its gradients."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

if TYPE_CHECKING:
    from sdft_lightning.modules.base import PolicyModule

_PAIR = 2**31  # more than any vocabulary has


class StepValues(Metric):
    """Values by name over the micro-batches of a window and over ranks.

    The names must be the same on all ranks, and be added in the same order; each window may have
    other ones.

    Attributes:
        sums: `(1 + K, 2)` weighted sum of each mean, and sum of its weights; the first row is of
            no mean, so that ranks never exchange an empty tensor.
        largest: `(1 + L,)` maxima; the first is of none.
    """

    full_state_update = False
    sums: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float32, whatever the default dtype is: bfloat16 counts to 256.
        self.add_state("sums", torch.zeros(1, 2, dtype=torch.float32), dist_reduce_fx="sum")
        self._means: list[str] = []
        self._maxima: list[str] = []
        self._pairs: dict[str, str] = {}  # name of what is logged: its state, a list of codes

    def update(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Add to a mean.

        Args:
            name: What is logged.
            values: Any shape; also none at all.
            weights: The same shape; equal without them.
        """
        values = values.detach().float()
        weights = torch.ones_like(values) if weights is None else weights.detach().float()
        self._add(name, torch.stack([(values * weights).sum(), weights.sum()]))

    def _add(self, name: str, found: Tensor) -> None:
        sums = self.sums.to(found.device)
        if name in self._means:
            sums[1 + self._means.index(name)] += found
            self.sums = sums
        else:
            self._means.append(name)
            self.sums = torch.cat([sums, found.unsqueeze(0)])  # (1 + K, 2)

    def update_largest(self, name: str, value: Tensor) -> None:
        """Add to a maximum; a NaN stays one."""
        value = value.detach().float()
        if "largest" not in self._defaults:
            none = torch.full((1,), -torch.inf, dtype=torch.float32)
            self.add_state("largest", none, dist_reduce_fx="max")
        largest = self.largest.to(value.device)
        if name in self._maxima:
            place = 1 + self._maxima.index(name)
            largest[place] = torch.maximum(largest[place], value)
            self.largest = largest
        else:
            self._maxima.append(name)
            self.largest = torch.cat([largest, value.reshape(1)])  # (1 + L,)

    def update_bigrams(self, name: str, ids: Tensor, mask: Tensor) -> None:
        """Add to the share of different pairs of neighbouring tokens.

        Args:
            name: What is logged.
            ids: `(R, T)` completions.
            mask: `(R, T)` their tokens.
        """
        state = self._pairs.setdefault(name, f"pairs_{len(self._pairs)}")
        if state not in self._defaults:
            self.add_state(state, [], dist_reduce_fx="cat")
        codes = bigrams(ids, mask)  # (pairs,)
        # Ranks never exchange an empty tensor: one number is of no pair.
        getattr(self, state).append(torch.cat([codes.new_tensor([-1]), codes]))
        count = codes.new_tensor([0, codes.numel()]).float()  # (2,)
        self._add(name, count)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name, the same on all ranks; a mean of no weight is 0, a share of no pairs 1.

        All ranks must call this together.
        """
        weights = self.sums[1:, 1]  # (K,)
        means = self.sums[1:, 0] / torch.where(weights > 0, weights, 1.0)  # (K,)
        found = dict(zip(self._means, means.unbind(), strict=True))
        for name, state in self._pairs.items():
            if name in found:
                count = weights[self._means.index(name)]
                different = dim_zero_cat(getattr(self, state)).unique().numel() - 1
                found[name] = torch.where(count > 0, different / count.clamp(min=1), 1.0)
        if self._maxima:
            found |= dict(zip(self._maxima, self.largest[1:].unbind(), strict=True))
        return found

    def reset(self) -> None:
        """Forget the window."""
        super().reset()
        self._means.clear()
        self._maxima.clear()

    def take(self) -> dict[str, Tensor]:
        """What `compute` says of the window that ends; the next one starts from none."""
        for state in self._pairs.values():
            if codes := getattr(self, state):  # ranks exchange each pair once
                setattr(self, state, [torch.cat(codes).unique()])
        found: dict[str, Tensor] = self.compute() if self._means or self._maxima else {}
        self.reset()
        return found


def bigrams(ids: Tensor, mask: Tensor) -> Tensor:
    """A number `(pairs,)` for each pair of neighbouring tokens, equal for equal pairs.

    Args:
        ids: `(R, T)`.
        mask: `(R, T)`, true up to the end of each row.
    """
    return (ids[:, :-1].long() * _PAIR + ids[:, 1:])[mask[:, 1:]]


def distinct_bigrams(completion_ids: Tensor, completion_mask: Tensor) -> float:
    """Distinct pairs of neighbouring tokens over all pairs, in a batch of completions.

    Near 0 where a policy repeats itself, 1 where no pair occurs twice.

    Args:
        completion_ids: `(R, T)`.
        completion_mask: `(R, T)`.
    """
    pairs = bigrams(completion_ids, completion_mask)  # (pairs,)
    return pairs.unique().numel() / pairs.numel() if pairs.numel() else 1.0


class Timing:
    """Seconds of each phase of optimizer steps, and completion tokens a second.

    A module calls `restart` when training starts, `start` and `stop` around a phase (or `timed`),
    `end_micro_batch` behind each micro-batch, and `log` behind the last one of a window. It waits
    for the GPU where there is one.

    Args:
        module: Logs; its device computes.

    Attributes:
        seconds: Of each phase of the micro-batch under way, by name.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.seconds: dict[str, float] = {}
        self._module = module
        self._started: dict[str, float] = {}
        self._window_seconds: Counter[str] = Counter()
        self._window_tokens = 0

    def restart(self) -> None:
        """Count from here: what an earlier fit left of a window is not of this one."""
        self.seconds.clear()
        self._window_seconds.clear()
        self._window_tokens = 0

    def start(self, phase: str) -> None:
        """Start the clock of a phase."""
        self._started[phase] = self._now()

    def stop(self, phase: str) -> None:
        """Stop it, and add its seconds."""
        spent = self._now() - self._started[phase]
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Measure what happens inside, for perf/<phase>_seconds."""
        self.start(phase)
        try:
            yield
        finally:
            self.stop(phase)

    def end_micro_batch(self, tokens: int) -> None:
        """Add the seconds of a micro-batch to those of its window.

        Args:
            tokens: Completion tokens that it trained on.
        """
        self.stop("step")
        self._window_seconds.update(self.seconds)
        self._window_tokens += tokens
        self.seconds.clear()

    def log(self) -> None:
        """Log the seconds of an optimizer step, summed over its window, on this process."""
        for phase, seconds in self._window_seconds.items():
            self._module.log(f"perf/{phase}_seconds", seconds)
        speed = self._window_tokens / self._window_seconds["step"]
        self._module.log("perf/tokens_per_second", speed, prog_bar=True)
        self.restart()

    def _now(self) -> float:
        if self._module.device.type == "cuda":
            torch.cuda.synchronize(self._module.device)
        return time.perf_counter()


class WindowGradients:
    """Makes a window's gradient the mean over its own micro-batches, and drops it after the step.

    A module calls `restart` when training starts, `added` behind each backward pass, and
    `drop_after_step` behind each micro-batch.

    Args:
        module: Whose parameters have the gradients.
    """

    def __init__(self, module: PolicyModule) -> None:
        self._module = module
        self._in_window = 0  # micro-batches whose gradients have been added up
        self._dropped_at = 0  # optimizer step after which gradients were dropped

    def restart(self) -> None:
        """Begin anew; of a run that was resumed inside of a window, first gradients are kept."""
        self._dropped_at = self._module.trainer.global_step
        self._in_window = 0

    def added(self) -> None:
        """Scale the gradients of a window that was shorter than the others.

        Lightning divides each loss by `accumulate_grad_batches`, also where an epoch's last window
        has fewer. The loss that is logged stays as it is.
        """
        self._in_window += 1
        if not self._module.window_ends:
            return
        full, found = self._module.trainer.accumulate_grad_batches, self._in_window
        self._in_window = 0
        if found != full:
            for parameter in self._module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(full / found)

    def drop_after_step(self) -> None:
        """Drop gradients after a step, when callbacks have seen them: the next needs the memory."""
        if self._module.trainer.global_step != self._dropped_at:
            self._dropped_at = self._module.trainer.global_step
            for parameter in self._module.student.parameters():
                parameter.grad = None


@contextmanager
def clipping_without_scale(plugin: Any) -> Iterator[None]:
    """Let a precision without a scale clip the gradients of any optimizer.

    Lightning refuses fused optimizers in all mixed precisions, since with float16 they divide
    gradients by the scale themselves; bfloat16 has no scale.

    Args:
        plugin: Lightning's precision plugin; its refusal of fused optimizers is put aside where it
            has no scaler.
    """
    if not isinstance(plugin, MixedPrecision) or plugin.scaler is not None:
        yield
        return
    plugin.clip_gradients = partial(Precision.clip_gradients, plugin)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del plugin.clip_gradients
