"""Which ways of computing a model are right for it, found out on a few tokens.

Rows of a batch are padded, finished rows are dropped, prompts are repeated for several completions,
what prompts share is computed once, and short rows stand side by side. Not every model allows all
of it: some count positions from the first column, some carry padding in a state, some caches cannot
drop a row. So each way is compared once with the plain pass over every row by itself, without
padding and without a cache, and is used only where both agree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.cached_steps import Appending, CachedSteps, without_cache
from sdft_lightning.forward.kv_cache import cache_argument, cache_of
from sdft_lightning.losses.masking import position_ids
from sdft_lightning.models.precision import eval_mode, takes_float32
from sdft_lightning.models.sharding import is_sharded

Decoding = Literal["masked", "unmasked", "grouped", "uncached"]

_NAME = "_sdft_forward_paths"
# Tokens of the probe: a prefix that both rows share, the rest of each prompt, its continuation.
_PREFIX, _RESTS, _STEPS = 4, (3, 7), 8
# Greatest error of a right path, as a part of what tells the positions of a row apart, and of the
# values themselves. Where rows padded on either side differ by less, other paths may differ by this
# many times as much: a few steps show little of a fault that grows.
_EXACT, _NOISE, _FINEST = (3e-3, 1e-5), 20, 1e-4
# In half precision, paths that are equal on paper differ by some hundredths, and a token that a
# router sends to another expert by more.
_HALF, _HALF_MEDIAN = (0.15, 2e-2), 0.05
# Options of configs that keep a token from seeing all tokens before it, where rows are long.
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
    "local_attention_window_len",
    "index_topk",
    "index_topk_blocks",
    "indexer_budget",
)


class NotComputed(UserError):
    """The model itself fails on token ids."""


class ForwardPaths(NamedTuple):
    """What a model can do.

    Attributes:
        pads_left: Rows padded on the left, with a mask and positions, are right. Otherwise rows
            begin in column 0, without mask and positions, padded behind their end.
        decoding: How tokens are appended. masked: to a cache, with the mask of all columns;
            unmasked: to a cache, without a mask; grouped: to one cache for each length of prompt,
            without padding, mask and positions; uncached: each step computes whole rows.
        drops_rows: Rows can be taken out of the cache.
        repeats_rows: Rows of the cache can be repeated.
        shares_prefix: A prefix can be computed apart and be used by several rows.
        keeps_prompts: The cache is keys and values alone, which can be kept and put together anew.
        packs: Attention takes a mask of its user's own, so that rows can stand side by side.
    """

    pads_left: bool = True
    decoding: Decoding = "masked"
    drops_rows: bool = True
    repeats_rows: bool = True
    shares_prefix: bool = True
    keeps_prompts: bool = True
    packs: bool = True


# Of a model that is spread over processes nothing is found out, as all would have to take part; nor
# of one whose weights have diverged, or that cannot be computed from these tokens.
_UNKNOWN = ForwardPaths(shares_prefix=False, keeps_prompts=False)


def paths_of(model: Any) -> ForwardPaths:
    """What a model can do, found out when it is first asked for and remembered with the model.

    Copies of the model remember it, too. On another kind of device it is found out anew, as other
    kernels compute there.

    Args:
        model: A causal language model of transformers.

    Raises:
        UserError: If the model sees tokens that follow.
    """
    known: tuple[str, ForwardPaths] | None = model.__dict__.get(_NAME)
    device = next(model.parameters()).device.type
    if is_sharded(model) or device == "meta":
        return _UNKNOWN if known is None else known[1]
    if known is not None and known[0] == device:
        return known[1]
    try:
        return find_paths(model)
    except NotComputed:
        return _UNKNOWN
    except Exception as error:  # a kernel that takes the precision of the run's own passes only
        if isinstance(error, UserError) or takes_float32(model):
            raise
        return _UNKNOWN


def find_paths(model: Any) -> ForwardPaths:
    """Find out what a model can do, and remember it with the model.

    Args:
        model: A causal language model of transformers.

    Raises:
        UserError: If the model cannot be computed from token ids, or sees tokens that follow.
    """
    name_decoder_(model)
    found = _find_paths(model)
    if found is not _UNKNOWN:
        model.__dict__[_NAME] = next(model.parameters()).device.type, found
    return found


def sees_all_before(model: Any) -> bool:
    """Whether each token attends to all tokens before it, by a kernel that takes any mask.

    Rows of the probe are shorter than windows, so the config is asked.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        and kinds == {"full_attention"}
        and not any(getattr(config, name, None) for name in _WINDOWS)
    )


def name_decoder_(model: Any) -> None:
    """Let `base_model` be the decoder below the head where its name leads back to the model."""
    if model.base_model is not model:
        return
    head = model.get_output_embeddings()
    for name, part in model.named_children():
        if part is not head and hasattr(part, "config"):
            model.base_model_prefix = name
            return


@torch.no_grad()
def _find_paths(model: Any) -> ForwardPaths:
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with (
        eval_mode(model),
        _without_hooks(model),
        torch.random.fork_rng(devices),  # some models draw even in eval mode
        _exact_precision(model, device.type),
    ):
        if "lsh" in (getattr(model.config, "attn_layers", None) or ()):
            raise UserError(
                f"model.policy.name: {type(model).__name__} attends to tokens that it draws at "
                "random (LSH attention), so two passes over a long row differ. Use another "
                "architecture."
            )
        probe = _Probe(model, device)
        if not probe.is_finite():
            return _UNKNOWN
        if not probe.is_right(probe.right):
            raise UserError(_not_causal(model, probe))
        noise = probe.error
        left = probe.is_right(probe.left)
        probe.allow(max(noise, probe.error) if left else noise)
        padded: tuple[Appending, ...] = ("masked", "unmasked") if left else ()
        kinds: tuple[Appending, ...] = (*padded, "grouped")
        every = probe.first_right(kinds, True, True)
        appending = every or probe.first_right(kinds)
        shares = left and probe.is_right(probe.shared_prefix)
        return ForwardPaths(
            pads_left=left,
            decoding=appending or "uncached",
            drops_rows=appending == every or probe.is_right(probe.steps, appending, True),
            repeats_rows=appending == every or probe.is_right(probe.steps, appending, False, True),
            shares_prefix=shares,
            keeps_prompts=shares and probe.plain_cache,
            packs=left and probe.is_right(probe.side_by_side),
        )


@contextmanager
def _exact_precision(model: Any, device: str) -> Iterator[None]:
    """Without autocast, but for kernels that take half precision only."""
    if takes_float32(model):
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield


@contextmanager
def _without_hooks(model: Any) -> Iterator[None]:
    """Call nothing that others have hooked to a model: the probe is none of their passes."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    if not takes_float32(model):  # its hooks may be what gives the kernel its precision
        yield
        return
    former = [
        (part, kind, getattr(part, kind))
        for part in model.modules()
        for kind in kinds
        if getattr(part, kind)
    ]
    for part, kind, _ in former:
        setattr(part, kind, OrderedDict())
    try:
        yield
    finally:
        for part, kind, hooks in former:
            setattr(part, kind, hooks)


def _not_causal(model: Any, probe: _Probe) -> str:
    name = f"{type(model).__name__} (model_type {model.config.model_type})"
    if not probe.is_right(probe.again):
        return (
            f"model.policy.name: {name} computes other states for the same tokens each time or "
            "after longer rows, even in eval mode, so passes cannot be compared. Use another "
            "architecture or, where rope_type is `dynamic`, a larger max_position_embeddings."
        )
    return (
        f"model.policy.name: what {name} predicts changes with the tokens that follow, so it is no "
        "causal language model as it is configured. Use another architecture; an encoder such as "
        "BERT needs `is_decoder: true` in its config.json, and weights that were trained so."
    )


class _Probe:
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
        steps = CachedSteps(self.model, kind, ids, mask)
        if repeat:
            steps.repeat(2)
            owner = [row for row in owner for _ in range(2)]
        found = [[values] for values in steps.logits]
        for step in range(_STEPS):
            if drop and step == _STEPS // 2 and len(owner) > 1:
                steps.select(torch.arange(1, len(owner), device=ids.device))
                owner, found = owner[1:], found[1:]
            tokens = torch.stack([rows[row][step - _STEPS] for row in owner])  # (A,)
            for values, predicted in zip(found, steps(tokens), strict=True):
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
