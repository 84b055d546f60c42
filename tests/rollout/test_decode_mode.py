"""What is changed about a model while it samples, and that all of it is put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdft_lightning.rollout import Sampling, StudentPasses, generate_rollout
from sdft_lightning.rollout.decode_mode import decode_mode
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import Tokens


def rollout(model: Any) -> Any:
    ids = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(1))
    sampling = Sampling(max_new_tokens=5)
    uniforms = row_uniforms(0, 0, ["a", "b", "c"], 1, 5)
    return generate_rollout(
        model, Tokens(ids, torch.ones_like(ids).bool()), sampling, uniforms, [2], 0
    )


def test_head_gets_its_inputs_in_one_piece_and_keeps_no_hook(model: Any) -> None:
    head = model.get_output_embeddings()
    before, inside = [], []
    ids = torch.randint(3, 60, (3, 6))
    handle = head.register_forward_hook(lambda _, given, __: before.append(given[0]))
    with torch.no_grad():
        expected = model(input_ids=ids, logits_to_keep=1).logits
        handle.remove()
        with decode_mode(model, 3, 1):
            handle = head.register_forward_hook(lambda _, given, __: inside.append(given[0]))
            found = model(input_ids=ids, logits_to_keep=1).logits
            handle.remove()
    # Otherwise this guards against nothing: the model's own slice has gaps between its rows.
    assert not before[0].is_contiguous()
    assert inside[0].is_contiguous()
    torch.testing.assert_close(found, expected)
    assert not head._forward_pre_hooks


def test_head_keeps_no_hook_after_an_error(model: Any) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), decode_mode(model, 3, 1):
        raise RuntimeError("in the middle")
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_only_weights_that_are_all_bfloat16_are_sampled_from_without_autocast(
    model: Any, either_processor: bool
) -> None:
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    mixed = StudentPasses("bfloat16").at(model, 0).sampler()
    next(iter(mixed.parameters())).data = next(iter(mixed.parameters())).data.float()
    with torch.autocast("cpu", torch.bfloat16):
        # A float32 model leaves it where it would be slow.
        for each, left in ((copied, False), (model, either_processor), (mixed, True)):
            with decode_mode(each, 3, 5):
                assert torch.is_autocast_enabled("cpu") is left
            assert torch.is_autocast_enabled("cpu")


def test_copy_samples_under_autocast_what_it_samples_without(model: Any) -> None:
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    plain = rollout(copied)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rollout(copied)
    assert inside.completion_ids.tolist() == plain.completion_ids.tolist()
    assert torch.equal(inside.sampled_log_probs, plain.sampled_log_probs)
