"""The shared prefix: the same states, gradients and tokens as the plain path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdft_lightning.forward.hidden import PromptCache, completion_hidden_states
from sdft_lightning.forward.layout import can_share, split_prompts
from sdft_lightning.losses.masking import position_ids
from sdft_lightning.types import Tokens


def enable_checkpointing(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True


def batch(prefix: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    lengths = [prefix + 3, prefix + 7, prefix + 1]
    width = max(lengths) + 2  # two columns of padding in every row
    ids = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros(3, width, dtype=torch.bool)
    start = torch.randint(5, 200, (prefix,), generator=generator)
    for row, length in enumerate(lengths):
        rest = torch.randint(5, 200, (length - prefix,), generator=generator)
        rest[0] = 10 + row  # so that nothing more is shared
        ids[row, -length:] = torch.cat([start, rest])
        mask[row, -length:] = True
    completion = torch.randint(5, 200, (3, 5), generator=generator)
    completion_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    return ids, mask, completion, completion_mask


def test_split_gives_back_the_prompts() -> None:
    ids, mask, _, _ = batch(9)
    split = split_prompts(Tokens(ids, mask))
    assert split.prefix_ids.numel() == 9
    for row in range(3):
        rest = split.rest.ids[row][split.rest.mask[row]]
        assert torch.equal(torch.cat([split.prefix_ids, rest]), ids[row][mask[row]])


def test_equal_prompts_keep_their_last_token_for_the_first_prediction() -> None:
    ids = torch.tensor([[7, 8, 9], [7, 8, 9]])
    split = split_prompts(Tokens(ids, torch.ones_like(ids).bool()))
    assert split.prefix_ids.tolist() == [7, 8]
    assert split.rest.ids.tolist() == [[9], [9]]


@pytest.mark.parametrize("prefix", [0, 9, 20])
def test_states_and_gradients_equal_the_plain_path(model: Any, prefix: int) -> None:
    arguments = batch(prefix)
    keep = arguments[-1]
    results = []
    for share in (True, False):
        model.zero_grad()
        hidden = completion_hidden_states(
            model, Tokens(*arguments[:2]), Tokens(*arguments[2:]), keep, share_prefix=share
        )
        hidden.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((hidden.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for shared, plain in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-3, atol=1e-4)


def test_states_equal_those_of_each_row_alone_without_padding(model: Any) -> None:
    ids, mask, completion, completion_mask = batch(9)
    hidden = completion_hidden_states(
        model, Tokens(ids, mask), Tokens(completion, completion_mask), completion_mask
    )
    alone = []
    for row in range(3):
        tokens = torch.cat([ids[row][mask[row]], completion[row][completion_mask[row]]])
        states = model.base_model(input_ids=tokens[None]).last_hidden_state[0]
        count = int(completion_mask[row].sum())
        alone.append(states[-count - 1 : -1])  # a state predicts the token after it
    torch.testing.assert_close(hidden, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_left_padding_does_not_shift_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_gradient_checkpointing_and_sliding_windows_take_the_plain_path(model: Any) -> None:
    assert can_share(model)
    model.config.sliding_window = 16
    assert not can_share(model)
    model.config.sliding_window = None
    enable_checkpointing(model)
    model.train()
    assert not can_share(model)


@pytest.mark.parametrize("fuse", [True, False])
def test_cached_prompts_give_the_same_states_in_any_batch(model: Any, fuse: bool) -> None:
    ids, mask, completion, completion_mask = batch(9)
    plain = completion_hidden_states(
        model,
        Tokens(ids, mask),
        Tokens(completion, completion_mask),
        completion_mask,
        share_prefix=False,
    )
    cache = PromptCache()
    for _ in range(2):  # the second time from memory
        cached = completion_hidden_states(
            model,
            Tokens(ids, mask),
            Tokens(completion, completion_mask),
            completion_mask,
            cache=cache,
            fuse=fuse,
        )
        torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)
    last = completion_hidden_states(
        model,
        Tokens(ids[2:], mask[2:]),
        Tokens(completion[2:], completion_mask[2:]),
        completion_mask[2:],
        cache=cache,
        fuse=fuse,
    )
    torch.testing.assert_close(last, plain[-3:], rtol=1e-4, atol=1e-5)
