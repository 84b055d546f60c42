"""Hidden states of a causal language model where they are needed, and its output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdft_lightning.errors import UserError
from sdft_lightning.forward.attention_kernel import training_attention
from sdft_lightning.forward.cached_steps import without_cache
from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.fused import ReadPrompts, completion_states, decoder_of, training_dtype
from sdft_lightning.forward.kv_cache import cache_argument
from sdft_lightning.forward.packing import (
    PackedRows,
    attention_mask,
    one_a_row,
    own_sequence,
    pack_if_worth,
    unpack,
)
from sdft_lightning.forward.prefix import (
    SplitPrompts,
    can_share,
    encode_prefix,
    split_if_worth,
    takes_own_mask,
)
from sdft_lightning.losses.masking import position_ids
from sdft_lightning.models.precision import eval_mode, product_dtype, without_slow_autocast
from sdft_lightning.models.sharding import gathered
from sdft_lightning.types import OutputHead

# Greatest relative difference between the model's own logits and those of `output_head`.
_HEAD_TOLERANCE = 2e-2


def hidden_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor, prefix_ids: Tensor | None = None
) -> Tensor:
    """Last hidden states, after the final norm: what the output head is applied to.

    Args:
        model: A causal language model of transformers.
        input_ids: `(B, L)`, padded on either side.
        attention_mask: `(B, L)` boolean.
        prefix_ids: `(K,)` tokens that stand before each row, without padding between.

    Returns:
        `(B, L, D)`, without the states of the prefix.
    """
    rows, shared = input_ids.shape[0], 0 if prefix_ids is None else prefix_ids.numel()
    cache = None
    if prefix_ids is not None and shared:
        cache = encode_prefix(model, prefix_ids, rows)
        ones = attention_mask.new_ones(rows, shared)  # (B, K)
        attention_mask = torch.cat([ones, attention_mask], dim=1)  # (B, K + L)
    output = model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask)[:, shared:],
        **cache_argument(model.base_model, cache),
        use_cache=cache is not None,
    )
    hidden: Tensor = output.last_hidden_state  # (B, L, D)
    return hidden


def completion_hidden_states(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    keep: Tensor,
    share_prefix: bool = True,
    pack: bool = True,
    fuse: bool = True,
    rounded: Any = None,
    read: ReadPrompts | None = None,
) -> Tensor:
    """Hidden states that predict the kept completion tokens.

    The state at a position predicts the token after it, so those of a completion begin at the
    last prompt token.

    Args:
        model: A causal language model of transformers.
        prompt_ids: `(B, P)`, padded on the left.
        prompt_mask: `(B, P)`.
        completion_ids: `(B, T)`, padded on the right.
        completion_mask: `(B, T)`.
        keep: `(B, T)` tokens of which the state is wanted.
        share_prefix: Compute what all prompts begin with only once, see `prefix`.
        pack: Lay short rows side by side instead of padding them, see `packing`.
        fuse: Compute known decoders in fewer operations where that is faster, see `fused`.
        rounded: The same model in bfloat16, where there is a copy: it spares fused decoders to cast
            their weights under bfloat16 autocast where that is multiplied, and is not used
            otherwise. Gradients are the model's.
        read: What the same weights have left of the prompts when they were sampled from, used up
            here; fused decoders need not compute it again.

    Returns:
        `(N, D)` with N = keep.sum(), row by row.
    """
    split = SplitPrompts(prompt_ids[0, :0], prompt_ids, prompt_mask)
    if share_prefix and can_share(model):
        split = split_if_worth(prompt_ids, prompt_mask)
    dtype = training_dtype(model)
    decoder = decoder_of(model) if fuse and dtype is not None else None
    if decoder is not None and dtype is not None:
        copied = decoder_of(rounded) if rounded is not None and rounded.dtype == dtype else None
        return completion_states(
            decoder, split, completion_ids, completion_mask, keep, dtype, copied, read
        )
    length = prompt_ids.shape[1] + completion_ids.shape[1]
    with without_slow_autocast(model), training_attention(model, prompt_ids.shape[0], length):
        return _plain_states(model, split, completion_ids, completion_mask, keep, pack)


def _plain_states(
    model: Any,
    split: SplitPrompts,
    completion_ids: Tensor,
    completion_mask: Tensor,
    keep: Tensor,
    pack: bool,
) -> Tensor:
    """Hidden states at kept completion tokens, `(N, D)`, by the model itself."""
    if not paths_of(model).pads_left:
        return _unpadded_states(model, split, completion_ids, completion_mask, keep)
    if pack and takes_own_mask(model):
        rows = pack_if_worth(split, completion_ids, completion_mask)
        if rows is not None:
            return unpack(_packed_hidden_states(model, split.prefix_ids, rows), rows, keep)
    # The last token of a completion predicts nothing.
    input_ids = torch.cat([split.rest_ids, completion_ids[:, :-1]], dim=1)  # (B, R + T - 1)
    mask = torch.cat([split.rest_mask, completion_mask[:, :-1]], dim=1)  # (B, R + T - 1)
    # Padding tokens may be embedded as zeros, where some norms have no gradient: repeat a real one.
    last = split.rest_ids[:, -1:]  # (B, 1)
    input_ids = torch.where(mask, input_ids, last)  # (B, R + T - 1)
    hidden = hidden_states(model, input_ids, mask, split.prefix_ids)  # (B, R + T - 1, D)
    predicting = hidden[:, split.rest_ids.shape[1] - 1 :]  # (B, T, D)
    return predicting[keep]  # (N, D)


def _unpadded_states(
    model: Any, split: SplitPrompts, completion_ids: Tensor, completion_mask: Tensor, keep: Tensor
) -> Tensor:
    """Hidden states of rows that begin in column 0, for models that do not read left padding."""
    rows = one_a_row(split, completion_ids, completion_mask)
    base = model.base_model
    hidden = base(input_ids=rows.ids, **without_cache(base)).last_hidden_state  # (B, L, D)
    return unpack(hidden, rows, keep)


def _packed_hidden_states(model: Any, prefix_ids: Tensor, rows: PackedRows) -> Tensor:
    """Hidden states `(G, L, D)` of sequences that stand side by side behind a shared prefix."""
    shared = prefix_ids.numel()
    cache = encode_prefix(model, prefix_ids, rows.ids.shape[0]) if shared else None
    output = model.base_model(
        input_ids=rows.ids,
        attention_mask=attention_mask(own_sequence(rows.sequence), shared, model.dtype),
        position_ids=rows.positions + shared,
        **cache_argument(model.base_model, cache),
        use_cache=cache is not None,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


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
