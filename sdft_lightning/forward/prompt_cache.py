"""Keys and values of prompts that come back every epoch, for a model that never changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.fused import Decoder, StoredPrompt, states_after, store_prompts
from sdft_lightning.forward.kv_cache import cache_of, run
from sdft_lightning.forward.layout import after, behind_prefix, can_share, split_if_worth
from sdft_lightning.types import Tokens


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
