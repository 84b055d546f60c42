"""Keys and values of prompts that come back every epoch, for a model that never changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.kv_cache import cache_argument, cache_of
from sdft_lightning.forward.prefix import can_share, encode_prefix, split_if_worth
from sdft_lightning.losses.masking import position_ids
from sdft_lightning.models.precision import without_slow_autocast


class _Prompt(NamedTuple):
    """What one prompt leaves behind.

    Attributes:
        states: Keys `(H, L, d)` and values `(H, L, e)` of each layer.
        last_hidden: `(D,)` the state that predicts the first completion token.
    """

    states: list[tuple[Tensor, Tensor]]
    last_hidden: Tensor


class PromptCache:
    """Remembers the keys and values of each prompt that it has seen.

    Memory is layers · 2 · key-value heads · head size · bytes for each prompt token. Only for a
    model whose weights do not change.
    """

    def __init__(self) -> None:
        self._prompts: dict[tuple[int, ...], _Prompt] = {}

    @torch.no_grad()
    def completion_hidden_states(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        keep: Tensor,
    ) -> Tensor:
        """Hidden states at kept completion tokens, `(N, D)`, without gradient.

        Raises:
            UserError: If the model's keys and values cannot be computed apart.
        """
        if not (can_share(model) and paths_of(model).keeps_prompts):
            raise UserError(
                "teacher.cache_prompts: the keys and values of this model cannot be kept (sliding "
                "window, layers with states of another kind, or an attention kernel without "
                "masks). Set it to false."
            )
        with without_slow_autocast(model):
            return self._states(
                model, prompt_ids, prompt_mask, completion_ids, completion_mask, keep
            )

    def _states(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        keep: Tensor,
    ) -> Tensor:
        keys = [
            tuple(ids[mask].tolist()) for ids, mask in zip(prompt_ids, prompt_mask, strict=True)
        ]
        missing = [row for row, key in enumerate(keys) if key not in self._prompts]
        if missing:
            new = [keys[row] for row in missing]
            self._encode(model, prompt_ids[missing], prompt_mask[missing], new)
        prompts = [self._prompts[key] for key in keys]
        first = torch.stack([prompt.last_hidden for prompt in prompts]).unsqueeze(1)  # (B, 1, D)
        if completion_ids.shape[1] == 1:
            return first[keep]  # (N, D)
        cache, mask = _assemble(prompts)
        mask = torch.cat([mask, completion_mask[:, :-1]], dim=1)  # (B, L + T - 1)
        output = model.base_model(
            input_ids=completion_ids[:, :-1],
            attention_mask=mask.long(),
            position_ids=position_ids(mask)[:, 1 - completion_ids.shape[1] :],
            **cache_argument(model.base_model, cache),
            use_cache=True,
        )
        predicting = torch.cat([first, output.last_hidden_state], dim=1)  # (B, T, D)
        return predicting[keep]  # (N, D)

    def _encode(self, model: Any, ids: Tensor, mask: Tensor, keys: list[tuple[int, ...]]) -> None:
        split = split_if_worth(ids, mask)
        shared, cache = split.prefix_ids.numel(), None
        whole = split.rest_mask  # (B, K + R)
        if shared:
            cache = encode_prefix(model, split.prefix_ids, len(keys))
            whole = torch.cat([whole.new_ones(len(keys), shared), whole], dim=1)
        output = model.base_model(
            input_ids=split.rest_ids,
            attention_mask=whole.long(),
            position_ids=position_ids(whole)[:, shared:],
            **cache_argument(model.base_model, cache),
            use_cache=True,
        )
        layers = cache_of(output).layers
        for row, key in enumerate(keys):
            kept = whole[row]  # the prefix, a gap of padding, the rest
            states = [(layer.keys[row][:, kept], layer.values[row][:, kept]) for layer in layers]
            self._prompts[key] = _Prompt(states, output.last_hidden_state[row, -1].clone())


def _assemble(prompts: list[_Prompt]) -> tuple[Any, Tensor]:
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
