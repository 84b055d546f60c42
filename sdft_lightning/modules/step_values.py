"""What is logged of an optimizer step: of its whole accumulation window, on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

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
