"""Sequences side by side in a row: the same states as padded, each blind to its neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.forward.hidden import completion_hidden_states
from sdft_lightning.forward.layout import PackedRows, SplitPrompts, pack_if_worth
from sdft_lightning.types import Tokens

# Lengths of prompts and completions, far apart enough to be worth packing.
PROMPTS, COMPLETIONS = [3, 9, 4, 12, 5], [1, 6, 8, 2, 3]


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **options,
    )
    return LlamaForCausalLM(config)


def batch(prefix: int = 0) -> tuple[Tensor, ...]:
    """Prompts `(5, 12)` padded on the left and completions `(5, 8)` on the right, with masks."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (5, 12 + prefix), generator=generator)
    completion_ids = torch.randint(2, 64, (5, 8), generator=generator)
    columns = torch.arange(12 + prefix)
    mask = columns >= 12 - torch.tensor(PROMPTS).unsqueeze(1)
    for row, length in enumerate(PROMPTS):
        ids[row, 12 - length : 12 - length + prefix] = torch.arange(2, 2 + prefix)
    completion_mask = torch.arange(8) < torch.tensor(COMPLETIONS).unsqueeze(1)
    return ids * mask, mask, completion_ids * completion_mask, completion_mask


def packed(tensors: tuple[Tensor, ...]) -> PackedRows | None:
    ids, mask, completion_ids, completion_mask = tensors
    return pack_if_worth(
        SplitPrompts(ids[0, :0], Tokens(ids, mask)), Tokens(completion_ids, completion_mask)
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prefix", [0, 10])
def test_packed_states_and_gradients_equal_the_padded_ones(attention: str, prefix: int) -> None:
    model = llama(attn_implementation=attention)
    ids, mask, completion_ids, keep = batch(prefix)
    assert packed((ids, mask, completion_ids, keep)) is not None
    found = []
    for pack in (True, False):
        model.zero_grad()
        hidden = completion_hidden_states(
            model,
            Tokens(ids, mask),
            Tokens(completion_ids, keep),
            keep,
            share_prefix=prefix > 0,
            pack=pack,
        )
        hidden.square().sum().backward()
        found.append((hidden.detach(), [p.grad.clone() for p in model.model.parameters()]))
    (ours, our_grads), (plain, plain_grads) = found
    assert ours.shape == (sum(COMPLETIONS), 16)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for one, other in zip(our_grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_sequence_equals_itself_alone_without_padding() -> None:
    model = llama().eval()
    ids, mask, completion_ids, keep = batch()
    hidden = completion_hidden_states(model, Tokens(ids, mask), Tokens(completion_ids, keep), keep)
    for row, part in enumerate(hidden.split(COMPLETIONS)):
        tokens = torch.cat([ids[row][mask[row]], completion_ids[row][keep[row]]])
        alone = model.model(input_ids=tokens.unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(part, alone[PROMPTS[row] - 1 : -1], atol=1e-5, rtol=1e-5)


def test_no_token_reads_its_neighbour_in_the_row() -> None:
    model = llama()
    ids, mask, completion_ids, keep = batch()
    rows = packed((ids, mask, completion_ids, keep))
    assert rows is not None
    assert len(rows.row.unique()) < 5  # some do share a row
    embedded: list[Tensor] = []

    def remember(module: Any, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.model.embed_tokens.register_forward_hook(remember)
    hidden = completion_hidden_states(model, Tokens(ids, mask), Tokens(completion_ids, keep), keep)
    hidden[: COMPLETIONS[0]].sum().backward()  # the first sequence only
    assert embedded[0].grad is not None
    touched = embedded[0].grad.abs().sum(dim=-1) > 0  # (G, L)
    assert touched.sum() == PROMPTS[0] + COMPLETIONS[0] - 1
    assert (rows.sequence[touched] == 0).all()


def test_the_last_token_of_a_completion_is_left_out_and_positions_start_anew() -> None:
    rows = packed(batch())
    assert rows is not None
    for index, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        mine = rows.sequence == index
        assert rows.positions[mine].tolist() == list(range(prompt + completion - 1))


def test_rows_of_one_length_are_not_packed() -> None:
    ids = torch.ones(4, 300, dtype=torch.long)
    completion = torch.ones(4, 20, dtype=torch.long)
    assert packed((ids, ids.bool(), completion, completion.bool())) is None


def test_empty_completions_keep_their_prompts_apart() -> None:
    ids, mask, completion_ids, keep = batch()
    keep = keep.clone()
    keep[1] = False
    hidden = completion_hidden_states(
        llama(), Tokens(ids, mask), Tokens(completion_ids, keep), keep
    )
    assert hidden.shape == (sum(COMPLETIONS) - COMPLETIONS[1], 16)
    assert hidden.isfinite().all()


def test_sliding_windows_are_padded_as_before() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=4,
        )
    )
    ids, mask, completion_ids, keep = batch()
    shapes = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: shapes.append(o.shape[:2]))
    completion_hidden_states(model, Tokens(ids, mask), Tokens(completion_ids, keep), keep)
    assert shapes == [(5, 12 + 8 - 1)]
