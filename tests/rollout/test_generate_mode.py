"""What generation leaves behind: modes, gradients, random state and inputs as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdft_lightning.rollout import Sampling, generate_rollout, greedy_rollout
from sdft_lightning.types import Rollout, Tokens

IDS = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()


def gpt2_with_dropout() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.5,
        initializer_range=0.3,
        eos_token_id=1,
        bos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def greedy(model: Any) -> Rollout:
    return greedy_rollout(model, Tokens(IDS, MASK), 6, [1], 0)


def test_a_model_in_train_mode_samples_without_dropout() -> None:
    model = gpt2_with_dropout()
    quiet = greedy(model.eval())
    seen: list[bool] = []
    model.transformer.h[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    loud = greedy(model.train())
    assert loud.completion_ids.tolist() == quiet.completion_ids.tolist()
    assert torch.equal(loud.sampled_log_probs, quiet.sampled_log_probs)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("fails", [False, True])
def test_every_part_is_put_back_into_its_own_mode(fails: bool) -> None:
    model = gpt2_with_dropout().train()
    model.transformer.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    if fails:

        def fail(*_: Any) -> None:
            raise RuntimeError("no memory")

        model.lm_head.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="no memory"):
            greedy(model)
    else:
        greedy(model)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_no_gradient_and_no_change_of_inputs_or_random_state(model: Any) -> None:
    ids, mask = IDS.clone(), MASK.clone()
    numbers = torch.full((2, 5), 0.5, dtype=torch.float64)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    rollout = generate_rollout(
        model, Tokens(ids, mask), Sampling(max_new_tokens=5), numbers, [2], 2
    )
    assert not rollout.sampled_log_probs.requires_grad
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ids, IDS)
    assert torch.equal(mask, MASK)


def test_masks_are_boolean_and_log_probs_float32(model: Any) -> None:
    rollout = greedy_rollout(model, Tokens(IDS, MASK), 5, [2], 2)
    assert rollout.completion_mask.dtype == rollout.truncated.dtype == torch.bool
    assert rollout.sampled_log_probs.dtype == torch.float32
    assert rollout.completion_ids.dtype == torch.long


def test_learned_positions_count_from_the_first_token_and_not_from_the_padding() -> None:
    model = gpt2_with_dropout().eval()
    alone = greedy_rollout(model, Tokens(IDS[:1, 1:], MASK[:1, 1:]), 6, [1], 0)
    batch = greedy(model)
    kept = batch.completion_mask[0]
    assert batch.completion_ids[0][kept].tolist() == alone.completion_ids[0].tolist()


def test_a_model_with_gradient_checkpointing_samples_the_same(model: Any) -> None:
    expected = greedy_rollout(model, Tokens(IDS, MASK), 8, [2], 2)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    found = greedy_rollout(model.train(), Tokens(IDS, MASK), 8, [2], 2)
    assert found.completion_ids.tolist() == expected.completion_ids.tolist()
