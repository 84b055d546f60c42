"""Two short rows, computed plainly and in each of the ways that `forward_paths` chooses from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.kv_cache import (
    Appending,
    CachedSteps,
    Inputs,
    Lengths,
    cache_argument,
    cache_of,
    run,
    without_cache,
)
from sdft_lightning.losses.masking import position_ids
from sdft_lightning.models.precision import takes_float32
from sdft_lightning.types import Tokens

# Tokens of the probe: a prefix that both rows share, the rest of each prompt, its continuation.
_PREFIX, _RESTS, _STEPS = 4, (3, 7), 8
# Greatest error of a right path, as a part of what tells the positions of a row apart, and of the
# values themselves. Where rows padded on either side differ by less, other paths may differ by this
# many times as much: a few steps show little of a fault that grows.
_EXACT, _NOISE, _FINEST = (3e-3, 1e-5), 20, 1e-4
# In half precision, paths that are equal on paper differ by some hundredths, and a token that a
# router sends to another expert by more.
_HALF, _HALF_MEDIAN = (0.15, 2e-2), 0.05


class NotComputed(UserError):
    """The model itself fails on token ids."""


class Probe:
    """Two short rows, computed plainly, and in each of the other ways.

    Args:
        model: A causal language model of transformers, in eval mode.
        device: Where it is.

    Raises:
        UserError: If the model cannot be called with token ids alone.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.base = model, model.base_model
        ids = _plain_ids(model, _PREFIX + sum(_RESTS) + 2 * _STEPS + len(_RESTS)).to(device)
        prefix, rest = ids[:_PREFIX], ids[_PREFIX:]
        self.rows: list[Tensor] = []  # each (L_i,)
        for length in (count + _STEPS for count in _RESTS):
            self.rows.append(torch.cat([prefix, rest[:length]]))
            rest = rest[length:]
        self.after = rest  # (2,) one more token for each row
        self.plain_cache = False
        self.error, self.tolerance = 0.0, _EXACT[0]
        dtype = next(model.parameters()).dtype
        rounds = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        rounds |= torch.is_autocast_enabled(device.type) or not takes_float32(model)
        self.exact = dtype == torch.float64 or (dtype == torch.float32 and not rounds)
        try:
            self.states = [self.base(input_ids=row[None]).last_hidden_state[0] for row in self.rows]
            self.logits = [model(input_ids=row[None]).logits[0] for row in self.rows]  # (L_i, V)
        except Exception as error:
            if not takes_float32(model):
                raise  # the caller knows the precision
            raise NotComputed(
                f"model.policy.name: {type(model).__name__} (model_type {model.config.model_type}) "
                f"cannot be computed from token ids alone: {type(error).__name__}: {error}. Use a "
                "causal language model that reads text."
            ) from error

    def is_right(self, path: Callable[..., list[tuple[Tensor, Tensor]]], *arguments: Any) -> bool:
        """Whether a path gives what plain passes give; one that fails is not right.

        Args:
            path: Returns pairs of values and those of the plain pass, each `(L, D)`.
            arguments: Of the path.
        """
        try:
            pairs = path(*arguments)
        except Exception:
            return False
        if not self.exact:
            return all(_agree_in_half(ours, plain) for ours, plain in pairs)
        errors = torch.tensor([_error(ours, plain) for ours, plain in pairs])
        self.error = float(errors.max())  # NaN where one is
        return self.error <= self.tolerance

    def allow(self, noise: float) -> None:
        """Tolerate what a model of so much noise needs, and no more."""
        self.tolerance = min(_EXACT[0], max(_FINEST, _NOISE * noise))

    def first_right(self, kinds: tuple[Appending, ...], *options: bool) -> Appending | None:
        """The first way of appending tokens that is right; options as of `steps`."""
        return next((kind for kind in kinds if self.is_right(self.steps, kind, *options)), None)

    def is_finite(self) -> bool:
        """Whether plain passes give numbers."""
        return all(bool(values.isfinite().all()) for values in [*self.states, *self.logits])

    def again(self) -> list[tuple[Tensor, Tensor]]:
        """The first row once more."""
        return [(self.base(input_ids=self.rows[0][None]).last_hidden_state[0], self.states[0])]

    def left(self) -> list[tuple[Tensor, Tensor]]:
        """Both rows, the shorter one padded on the left."""
        ids, mask = _pad_left(self.rows)
        states = self.base(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=position_ids(mask),
            **cache_argument(self.base, None),
            use_cache=False,
        ).last_hidden_state  # (2, L, D)
        return [
            (state[-len(plain) :], plain) for state, plain in zip(states, self.states, strict=True)
        ]

    def right(self) -> list[tuple[Tensor, Tensor]]:
        """Both rows from column 0, with other tokens behind the shorter one and no mask.

        Right where no token sees those after it.
        """
        longest = max(map(len, self.rows)) + 1
        ids = torch.stack(
            [
                torch.cat([row, token.expand(longest - len(row))])
                for row, token in zip(self.rows, self.after, strict=True)
            ]
        )  # (2, L + 1)
        states = self.base(input_ids=ids, **without_cache(self.base)).last_hidden_state
        return [
            (state[: len(plain)], plain) for state, plain in zip(states, self.states, strict=True)
        ]

    def steps(
        self, kind: Appending, drop: bool = False, repeat: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Read the prompts and append their continuations.

        Args:
            kind: How.
            drop: Drop the first row on the way.
            repeat: Repeat each prompt once it was read.
        """
        if kind == "grouped":
            longer = self.rows[1]
            parts = [([row], [plain]) for row, plain in zip(self.rows, self.logits, strict=True)]
            # Two rows of one length, so that there is one to drop.
            short = longer[: len(self.rows[0])]
            parts[0] = ([self.rows[0], short], [self.logits[0], self.logits[1][: len(short)]])
        else:
            parts = [(self.rows, self.logits)]
        pairs = []
        for rows, plain in parts:
            pairs += self._decode_part(kind, rows, plain, drop, repeat)
        return pairs

    def _decode_part(
        self, kind: Appending, rows: list[Tensor], plain: list[Tensor], drop: bool, repeat: bool
    ) -> list[tuple[Tensor, Tensor]]:
        ids, mask = _pad_left([row[:-_STEPS] for row in rows])
        owner = list(range(len(rows)))
        steps = CachedSteps(self.model, kind, Inputs.behind(Tokens(ids, mask)))
        if repeat:
            steps.repeat(2)
            owner = [row for row in owner for _ in range(2)]
        found = [[values] for values in steps.logits]
        for step in range(_STEPS):
            if drop and step == _STEPS // 2 and len(owner) > 1:
                steps.keep(torch.arange(1, len(owner), device=ids.device))
                owner, found = owner[1:], found[1:]
            tokens = torch.stack([rows[row][step - _STEPS] for row in owner])  # (A,)
            for values, predicted in zip(found, steps.step(tokens), strict=True):
                values.append(predicted)
        return [
            (torch.stack(values), plain[row][-_STEPS - 1 :])
            for row, values in zip(owner, found, strict=True)
        ]

    def shared_prefix(self) -> list[tuple[Tensor, Tensor]]:
        """The prefix computed once, and the rest of each row behind it."""
        cache = cache_of(self.base(input_ids=self.rows[0][None, :_PREFIX], use_cache=True))
        # Keys and values and nothing else in each layer.
        layers = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
        self.plain_cache = type(cache).__name__ == "DynamicCache" and layers == {"DynamicLayer"}
        cache.batch_repeat_interleave(len(self.rows))
        ids, mask = _pad_left([row[_PREFIX:] for row in self.rows])
        whole = torch.nn.functional.pad(mask, (_PREFIX, 0), value=True)  # (2, K + L)
        states = self.base(
            input_ids=ids,
            attention_mask=whole.long(),
            position_ids=position_ids(whole)[:, _PREFIX:],
            **cache_argument(self.base, cache),
            use_cache=True,
        ).last_hidden_state
        return [
            (state[_PREFIX - len(plain) :], plain[_PREFIX:])
            for state, plain in zip(states, self.states, strict=True)
        ]

    def side_by_side(self) -> list[tuple[Tensor, Tensor]]:
        """Both rows in one, blind to each other."""
        seen = torch.block_diag(*(torch.ones(len(row), len(row)).tril() for row in self.rows))
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.after.device)  # (L, L)
        mask.masked_fill_(seen.to(mask.device) == 0, torch.finfo(mask.dtype).min)
        places = torch.cat([torch.arange(len(row)) for row in self.rows]).to(mask.device)  # (L,)
        states = self.base(
            input_ids=torch.cat(self.rows)[None],
            attention_mask=mask[None, None],
            position_ids=places[None],
            **cache_argument(self.base, None),
            use_cache=False,
        ).last_hidden_state[0]  # (L, D)
        return [
            (state, plain)
            for state, plain in zip(states.split([*map(len, self.rows)]), self.states, strict=True)
        ]

    def end_to_end(self) -> list[tuple[Tensor, Tensor]]:
        """Both rows in one, told apart by their lengths and by positions that start anew."""
        counts = [*map(len, self.rows)]
        inputs = Inputs(
            torch.cat(self.rows)[None],
            positions=torch.cat([torch.arange(count) for count in counts])[None].to(
                self.after.device
            ),
            lengths=Lengths.of(torch.tensor(counts, device=self.after.device)),
        )
        states = run(self.model, inputs).last_hidden_state[0]  # (L, D)
        return list(zip(states.split(counts), self.states, strict=True))


def _distances(ours: Tensor, plain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Error of each position `(L,)`, what tells positions apart, and the size of the values.

    The error is measured by the second: outputs that are nearly the same everywhere would hide a
    fault otherwise.
    """
    ours, plain = ours.float(), plain.float()  # (L, D)
    errors = (ours - plain).square().mean(dim=-1).sqrt()  # (L,)
    spread = (plain - plain.mean(dim=0)).square().mean().sqrt()
    return errors, spread, plain.square().mean().sqrt()


def _error(ours: Tensor, plain: Tensor) -> float:
    """Greatest error of a position, less what rounding explains, as a part of the spread."""
    errors, spread, size = _distances(ours, plain)
    return float((errors.max() - _EXACT[1] * size).clamp(min=0) / spread.clamp(min=1e-30))


def _agree_in_half(ours: Tensor, plain: Tensor) -> bool:
    """Whether values are those of the plain pass, at nearly all positions."""
    errors, spread, size = _distances(ours, plain)
    small = bool(errors.mean() <= _HALF[0] * spread + _HALF[1] * size)
    return small or bool(errors.median() <= _HALF_MEDIAN * spread)


def _plain_ids(model: Any, count: int) -> Tensor:
    """Different token ids `(count,)` that mean nothing special to the model."""
    rows = model.get_input_embeddings().weight.shape[0]
    config = model.config.get_text_config(decoder=True)
    special = {
        value
        for part in (model.config, config)
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    ids: list[int] = []
    for index in range(1, count + 1):
        token = index * max(1, rows // (count + 1))
        near = (each % rows for each in range(token, token + rows))
        ids.append(next((each for each in near if each not in special | set(ids)), token % rows))
    return torch.tensor(ids)


def _pad_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows `(L_i,)` as ids and mask `(B, L)`."""
    width = max(map(len, rows))
    pad = torch.nn.functional.pad
    ids = torch.stack([pad(row, (width - len(row), 0)) for row in rows])  # (B, L)
    mask = torch.stack(
        [pad(torch.ones_like(row).bool(), (width - len(row), 0), value=False) for row in rows]
    )  # (B, L)
    return ids, mask
