"""What is logged of an optimizer step: of its whole accumulation window, on all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

_PAIR = 2**31  # more than any vocabulary has


class StepValues:
    """Adds values up over the micro-batches of a window; `take` combines those of all ranks.

    The names must be the same on all ranks, and be added in the same order.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,): weighted sum, sum of the weights
        self._largest: dict[str, Tensor] = {}
        self._bigrams: dict[str, list[Tensor]] = {}

    def clear(self) -> None:
        """Forget the window under way."""
        self._sums, self._largest, self._bigrams = {}, {}, {}

    def add(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Add to a mean.

        Args:
            name: What is logged.
            values: Any shape; also none at all.
            weights: The same shape; equal without them.
        """
        values = values.detach().float()
        weights = torch.ones_like(values) if weights is None else weights.detach().float()
        found = torch.stack([(values * weights).sum(), weights.sum()])  # (2,)
        self._sums[name] = self._sums[name] + found if name in self._sums else found

    def add_largest(self, name: str, value: Tensor) -> None:
        """Add to a maximum; a NaN stays one."""
        value = value.detach().float()
        known = self._largest.get(name)
        self._largest[name] = value if known is None else torch.maximum(known, value)

    def add_bigrams(self, name: str, ids: Tensor, mask: Tensor) -> None:
        """Add to the share of different pairs of neighbouring tokens.

        Args:
            name: What is logged.
            ids: `(R, T)` completions.
            mask: `(R, T)` their tokens.
        """
        self._bigrams.setdefault(name, []).append(bigrams(ids, mask))

    def take(self, strategy: Any) -> dict[str, Tensor]:
        """The values of the window that ends, the same on all ranks; the next starts from none.

        Args:
            strategy: Lightning's, which knows the other ranks; all must call this together.

        Returns:
            Scalars by name; a mean of no weight is 0, a share of no pairs 1.
        """
        pairs = {name: torch.cat(parts) for name, parts in self._bigrams.items()}  # (pairs,)
        sums = dict(self._sums)
        for name, codes in pairs.items():
            sums[name] = torch.stack([codes.new_zeros(()), codes.new_tensor(codes.numel())]).float()
        found: dict[str, Tensor] = {}
        if sums:
            # In one vector, so that there is one exchange.
            totals = strategy.reduce(torch.stack(list(sums.values())), reduce_op="sum")  # (K, 2)
            means = totals[:, 0] / torch.where(totals[:, 1] > 0, totals[:, 1], 1.0)  # (K,)
            found = dict(zip(sums, means.unbind(), strict=True))
            counts = dict(zip(sums, totals[:, 1].unbind(), strict=True))
            found |= {name: _share(codes, counts[name]) for name, codes in pairs.items()}
        if self._largest:
            largest = strategy.reduce(torch.stack(list(self._largest.values())), reduce_op="max")
            found |= dict(zip(self._largest, largest.unbind(), strict=True))
        self.clear()
        return found


def _share(codes: Tensor, count: Tensor) -> Tensor:
    """Different pairs of all ranks over all `count` pairs."""
    different = codes.unique()  # (pairs of this rank,)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        different = torch.cat(gather_all_tensors(different)).unique()
    return torch.where(count > 0, different.numel() / count.clamp(min=1), 1.0)


def bigrams(ids: Tensor, mask: Tensor) -> Tensor:
    """A number `(pairs,)` for each pair of neighbouring tokens, equal for equal pairs.

    Args:
        ids: `(R, T)`.
        mask: `(R, T)`, true up to the end of each row.
    """
    return (ids[:, :-1].long() * _PAIR + ids[:, 1:])[mask[:, 1:]]
