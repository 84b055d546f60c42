"""Hidden states of a causal language model where they are needed, and its output head.

`PromptCache` stores keys and values of prompts that come back every epoch, for a model that never
changes.

With gradients, short rows on a CPU attend by the plain formula: the backward pass of the flash
kernel takes several times as long in bfloat16. The formula computes in float32 and stores its
scores, so it is used only where these are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdft_lightning.errors import UserError
from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.fused import (
    Decoder,
    ReadPrompts,
    StoredPrompt,
    completion_states,
    decoder_of,
    states_after,
    store_prompts,
    training_dtype,
)
from sdft_lightning.forward.kv_cache import cache_of, run
from sdft_lightning.forward.layout import (
    SplitPrompts,
    after,
    behind_prefix,
    can_share,
    layout_of,
    split_for,
    split_if_worth,
)
from sdft_lightning.models.precision import (
    eval_mode,
    product_dtype,
    takes_float32,
    without_slow_autocast,
)
from sdft_lightning.models.sharding import gathered
from sdft_lightning.types import OutputHead, Tokens

# Scores of a layer: 4 MB in float32. With more the flash kernel is as fast.
_MOST_SCORES = 2**20


@contextmanager
def training_attention(model: Any, rows: int, tokens: int) -> Iterator[None]:
    """Let a forward pass with gradients use the plain formula where that is faster.

    Args:
        model: A causal language model of transformers.
        rows: Sequences of the pass.
        tokens: Tokens of the longest, padding included.
    """
    if _plain_is_faster(model, rows, tokens):
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


def _plain_is_faster(model: Any, rows: int, tokens: int) -> bool:
    if not torch.is_grad_enabled() or model.device.type != "cpu":
        return False
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    dtype = model.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    # Recomputed activations must come from the same kernel, and they are outside of this.
    recomputes = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    heads = getattr(model.config, "num_attention_heads", None)
    if dtype != torch.bfloat16 or recomputes or heads is None:
        return False
    return bool(rows * heads * tokens**2 <= _MOST_SCORES)


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Inside, a model whose kernel is of GPUs or of half precision computes on any device."""
    if takes_float32(model):
        yield
        return
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@torch.no_grad()
def autocast_if_needed_(model: Any) -> None:
    """Let a float32 model compute in bfloat16 autocast if its attention refuses float32.

    A teacher's weights stay in float32 beside a student in bfloat16, with the student's kernel,
    or with plain attention where autocast does not help.

    Args:
        model: A causal language model of transformers, whole, in the context that it is used in.
    """
    if takes_float32(model):
        return
    base = model.base_model
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)  # (1, 2)
    if _computes(base, ids):
        return
    hooks = [
        base.register_forward_pre_hook(_enter_autocast),
        base.register_forward_hook(_leave_autocast, always_call=True),
    ]
    if not _computes(base, ids):
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation("eager")


def _computes(base: Any, ids: Tensor) -> bool:
    try:
        base(input_ids=ids, use_cache=False)
    except Exception:  # kernels refuse in their own words
        return False
    return True


def _enter_autocast(base: nn.Module, _: Any) -> None:
    first = next(base.parameters())
    needed = first.dtype == torch.float32 and not torch.is_autocast_enabled(first.device.type)
    autocast = torch.autocast(first.device.type, torch.bfloat16, enabled=True) if needed else None
    if autocast is not None:
        autocast.__enter__()
    base.__dict__["own_autocast"] = autocast


def _leave_autocast(base: nn.Module, _: Any, output: Any) -> None:
    autocast = base.__dict__.pop("own_autocast", None)
    if autocast is not None:
        autocast.__exit__(None, None, None)


# Greatest relative difference between the model's own logits and those of `output_head`.
_HEAD_TOLERANCE = 2e-2


def completion_hidden_states(
    model: Any,
    prompts: Tokens,
    completions: Tokens,
    keep: Tensor,
    share_prefix: bool = True,
    pack: bool = True,
    fuse: bool = True,
    rounded: Any = None,
    read: Sequence[ReadPrompts] = (),
    cache: PromptCache | None = None,
) -> Tensor:
    """Hidden states that predict the kept completion tokens.

    The state at a position predicts the token after it, so those of a completion begin at the
    last prompt token.

    Args:
        model: A causal language model of transformers.
        prompts: `(B, P)`, padded on the left.
        completions: `(B · n, T)`, padded on the right: n of each prompt.
        keep: `(B · n, T)` tokens of which the state is wanted.
        share_prefix: Compute what all prompts begin with only once, see `layout`.
        pack: Lay rows side by side or end to end instead of padding them, see `layout`.
        fuse: Compute known decoders in fewer operations where that is faster, see `fused`.
        rounded: The same model in bfloat16, where there is a copy: it spares fused decoders to cast
            their weights under bfloat16 autocast where that is multiplied, and is not used
            otherwise. Gradients are the model's.
        read: What the same weights have computed while sampling; fused decoders use up the first
            that is of these tokens, and need not compute it again.
        cache: Stores what is computed of prompts for later calls. For a model whose weights do not
            change; no gradient flows then.

    Returns:
        `(N, D)` with N = keep.sum(), row by row.

    Raises:
        UserError: If prompts are to be stored and the model does not allow it.
    """
    dtype = training_dtype(model)
    decoder = decoder_of(model) if fuse and dtype is not None else None
    if cache is not None:
        check_keeps_prompts(model)
    if decoder is not None and dtype is not None:
        copied = decoder_of(rounded) if rounded is not None and rounded.dtype == dtype else None
        if cache is not None:
            return cache.fused_states(decoder, prompts, completions, keep, dtype)
        split = split_for(model, prompts) if share_prefix else SplitPrompts.whole(prompts)
        return completion_states(decoder, split, completions, keep, dtype, copied, read)
    # A fused decoder computes each prompt once, however many completions it has.
    prompts = prompts.repeat(completions.ids.shape[0] // prompts.ids.shape[0])
    length = prompts.ids.shape[1] + completions.ids.shape[1]
    with without_slow_autocast(model), training_attention(model, prompts.ids.shape[0], length):
        if cache is not None:
            return cache.states(model, prompts, completions, keep)
        split = split_for(model, prompts) if share_prefix else SplitPrompts.whole(prompts)
        return layout_of(model, split, completions, pack).states(model, keep)


def output_head(model: Any) -> OutputHead:
    """The head of a causal language model, with the scale and cap that its config names.

    Args:
        model: A causal language model of transformers.

    Returns:
        The model's own parameters, or whole ones gathered from its shards, with gradient.

    Raises:
        UserError: If the model has no linear head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"model.policy.name: {type(model).__name__} has no linear output head (found "
            f"{type(head).__name__}); the loss needs one. Use a causal language model."
        )
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    bias = None if head.bias is None else gathered(head.bias)
    return OutputHead(gathered(head.weight), bias, float(scale), softcap)


def apply_head(head: OutputHead, hidden: Tensor) -> Tensor:
    """Logits `(..., V)` of hidden states `(..., D)`; for few tokens, as all V are formed."""
    dtype = product_dtype(head.weight.dtype, hidden.device.type)
    bias = None if head.bias is None else head.bias.to(dtype)
    logits = nn.functional.linear(hidden.to(dtype), head.weight.to(dtype), bias)
    if head.scale != 1.0:  # on a CPU a product by one costs as much as the largest token's search
        logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


@torch.no_grad()
def check_output_head(model: Any) -> None:
    """Compare `output_head` with the model's own logits on three tokens, before any training.

    Raises:
        UserError: If they differ, that is, if the model does more between its last hidden state
            and its logits than is known here.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([[0, 1, 2]], device=device)  # (1, 3)
    with eval_mode(model):
        own = model(input_ids=ids).logits.float()  # (1, 3, V)
        states = model.base_model(input_ids=ids).last_hidden_state  # (1, 3, D)
        head = output_head(model)
        if states.shape[-1] != head.weight.shape[1]:
            raise UserError(
                f"model.policy.name: {type(model).__name__} changes its hidden states before its "
                f"output head (from {states.shape[-1]} to {head.weight.shape[1]} values), which "
                "the loss does not know. Use another architecture."
            )
        ours = apply_head(head, states).float()
    difference = float((own - ours).abs().max() / own.abs().max().clamp(min=1e-6))
    if difference > _HEAD_TOLERANCE:
        raise UserError(
            f"model.policy.name: {type(model).__name__} changes its logits in a way that the loss "
            f"does not know (relative difference {difference:.2g}); training it would be wrong. "
            "Please report the model's name."
        )


# --- prompts that come back every epoch ---------------------------------------------------------


def check_keeps_prompts(model: Any) -> None:
    """Refuse a model whose keys and values cannot be computed apart and stored.

    Raises:
        UserError: Names the option.
    """
    if not (can_share(model) and paths_of(model).keeps_prompts):
        raise UserError(
            "teacher.cache_prompts: the keys and values of this model cannot be kept (sliding "
            "window, layers with states of another kind, or an attention kernel without "
            "masks). Set it to false."
        )


class PromptCache:
    """Remembers the keys and values of each prompt that it has seen.

    Memory is layers · 2 · key-value heads · head size · bytes for each prompt token. Only for a
    model whose weights do not change.
    """

    def __init__(self) -> None:
        # Fused blocks and the model itself store keys in different orders of axes.
        self._plain: dict[tuple[int, ...], StoredPrompt] = {}
        self._fused: dict[tuple[int, ...], StoredPrompt] = {}

    @torch.no_grad()
    def states(self, model: Any, prompts: Tokens, completions: Tokens, keep: Tensor) -> Tensor:
        """Hidden states `(N, D)` at kept completion tokens, by the model itself.

        Args:
            model: A causal language model of transformers.
            prompts: `(R, P)`, padded on the left.
            completions: `(R, T)`, padded on the right.
            keep: `(R, T)`.
        """
        known = self._known(self._plain, prompts, lambda missing: _read(model, missing))
        cache, mask = _assemble(known)
        last = torch.stack([prompt.last for prompt in known]).unsqueeze(1)  # (R, 1, D)
        return after(last, mask, cache, completions).states(model, keep)

    @torch.no_grad()
    def fused_states(
        self,
        decoder: Decoder,
        prompts: Tokens,
        completions: Tokens,
        keep: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Hidden states `(N, D)` at kept completion tokens, in fused blocks.

        Arguments as of `completion_states`.
        """

        def read(missing: Tokens) -> list[StoredPrompt]:
            # One by one: what is stored must not depend, in its last bits, on which others were
            # read with it; a resumed run reads them in other company.
            alone = (missing.rows(slice(row, row + 1)) for row in range(len(missing.ids)))
            return [store_prompts(decoder, split_if_worth(each), dtype)[0] for each in alone]

        known = self._known(self._fused, prompts, read)
        return states_after(decoder, known, completions, keep, dtype)

    def _known(
        self,
        stored: dict[tuple[int, ...], StoredPrompt],
        prompts: Tokens,
        read: Callable[[Tokens], list[StoredPrompt]],
    ) -> list[StoredPrompt]:
        """What is stored of each prompt; those that are missing are read now."""
        keys = [tuple(ids) for ids in prompts.lists()]
        missing = {key: row for row, key in enumerate(keys) if key not in stored}
        if missing:
            found = read(prompts.rows(list(missing.values())))
            stored.update(zip(missing, found, strict=True))
        return [stored[key] for key in keys]


def _read(model: Any, prompts: Tokens) -> list[StoredPrompt]:
    """Keys `(H, L, d)` and values `(H, L, e)` of each prompt, and the last state."""
    inputs = behind_prefix(model, split_if_worth(prompts))
    output = run(model, inputs, fill=True)
    layers = cache_of(output).layers
    assert inputs.mask is not None
    found = []
    for row, seen in enumerate(inputs.mask):  # the prefix, a gap of padding, the rest
        states = [(layer.keys[row][:, seen], layer.values[row][:, seen]) for layer in layers]
        found.append(StoredPrompt(states, output.last_hidden_state[row, -1].clone()))
    return found


def _assemble(prompts: list[StoredPrompt]) -> tuple[Any, Tensor]:
    """One cache of all prompts, padded on the left, and its mask `(B, L)`."""
    from transformers import DynamicCache

    lengths = [prompt.states[0][0].shape[1] for prompt in prompts]
    width = max(lengths)
    first = prompts[0].states[0][0]
    mask = torch.zeros(len(prompts), width, dtype=torch.bool, device=first.device)  # (B, L)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = True
    cache = DynamicCache()
    for layer in range(len(prompts[0].states)):
        keys, values = (
            torch.stack(
                [
                    torch.nn.functional.pad(prompt.states[layer][part], (0, 0, width - length, 0))
                    for prompt, length in zip(prompts, lengths, strict=True)
                ]
            )
            for part in (0, 1)
        )  # (B, H, L, d), (B, H, L, e)
        cache.update(keys, values, layer)
    return cache, mask
