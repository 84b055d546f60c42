"""Which ways of computing a model are right for it, found out on a few tokens.

Rows of a batch are padded, finished rows are dropped, prompts are repeated for several completions,
what prompts share is computed once, and short rows stand side by side. Not every model allows all
of it: some count positions from the first column, some carry padding in a state, some caches cannot
drop a row. So each way is compared once with the plain pass over every row by itself, without
padding and without a cache, and is used only where both agree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from sdft_lightning.errors import UserError
from sdft_lightning.forward.kv_cache import (
    Appending,
)
from sdft_lightning.forward.probe import NotComputed, Probe
from sdft_lightning.models.precision import eval_mode, takes_float32
from sdft_lightning.models.sharding import is_sharded

Decoding = Literal["masked", "unmasked", "grouped", "uncached"]

_NAME = "_sdft_forward_paths"
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
        ends_to_end: Sequences can lie end to end in one row, told apart by their lengths, where the
            attention kernel takes these.
    """

    pads_left: bool = True
    decoding: Decoding = "masked"
    drops_rows: bool = True
    repeats_rows: bool = True
    shares_prefix: bool = True
    keeps_prompts: bool = True
    packs: bool = True
    ends_to_end: bool = True


# Of a model that is spread over processes nothing is found out, as all would have to take part; nor
# of one whose weights have diverged, or that cannot be computed from these tokens.
_UNKNOWN = ForwardPaths(shares_prefix=False, keeps_prompts=False, ends_to_end=False)


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


def attends_to_all(model: Any) -> bool:
    """Whether each token attends to all tokens before it.

    Rows of the probe are shorter than windows, so the config is asked.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = (getattr(config, name, None) for name in _WINDOWS)
    return kinds == {"full_attention"} and not any(windows)


def sees_all_before(model: Any) -> bool:
    """Whether each token attends to all tokens before it, by a kernel that takes any mask."""
    config = model.config.get_text_config(decoder=True)
    kernel = getattr(config, "_attn_implementation", None)
    return kernel in ("sdpa", "eager") and attends_to_all(model)


def kernel_takes_lengths(model: Any) -> bool:
    """Whether attention is a kernel that takes cumulative lengths in place of a mask.

    Those for which transformers forms no mask where nothing is padded: flash attention of any
    version, and kernels that others have registered alike.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

    if takes_float32(model):  # sdpa, eager, flex
        return False
    mask = ALL_MASK_ATTENTION_FUNCTIONS.get(model.config._attn_implementation)
    return mask is flash_attention_mask


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
        probe = Probe(model, device)
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
            ends_to_end=probe.is_right(probe.end_to_end),
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


def _not_causal(model: Any, probe: Probe) -> str:
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
