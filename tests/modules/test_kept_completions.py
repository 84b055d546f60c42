"""Completions kept by row: as a rollout, as a state."""

from __future__ import annotations

import torch

from sdft_lightning.modules.completions import KeptCompletion, KeptCompletions
from sdft_lightning.types import Rollout

CPU = torch.device("cpu")
PAD = 2  # also the stop token


def kept() -> KeptCompletions:
    found = KeptCompletions()
    found.put("b", [KeptCompletion([5, 2], False), KeptCompletion([6, 7, 8], True)])
    found.put("a", [KeptCompletion([9, 2], False), KeptCompletion([2], False)])
    return found


def test_rollout_pads_on_the_right_and_a_stop_token_equal_to_pad_stays_inside_the_mask() -> None:
    rollout = kept().rollout(["a", "b"], PAD, CPU)
    assert rollout.completion_ids.tolist() == [[9, 2, 2], [2, 2, 2], [5, 2, 2], [6, 7, 8]]
    assert rollout.completion_mask.sum(dim=1).tolist() == [2, 1, 2, 3]
    assert rollout.completion_mask[:, 0].all()
    assert rollout.truncated.tolist() == [False, False, False, True]
    assert rollout.sampled_log_probs.isnan().all()


def test_a_rollout_that_was_put_comes_back_row_by_row_whatever_the_order() -> None:
    ids = torch.tensor([[4, 2, 2], [5, 6, 7], [8, 9, 2], [2, 2, 2]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]]).bool()
    truncated = torch.tensor([False, True, False, False])
    found = KeptCompletions()
    found.put_rollout(["x", "y"], Rollout(ids, mask, torch.zeros(4, 3), truncated))
    assert "x" in found
    assert "z" not in found
    back = found.rollout(["y", "x"], PAD, CPU)
    order = [2, 3, 0, 1]
    assert torch.equal(back.completion_mask, mask[order])
    assert torch.equal(back.completion_ids[back.completion_mask], ids[order][mask[order]])
    assert torch.equal(back.truncated, truncated[order])


def test_state_survives_a_checkpoint_that_holds_tensors_only(tmp_path: object) -> None:
    path = f"{tmp_path}/state.pt"
    torch.save(kept().state(), path)
    found = KeptCompletions()
    found.put("old", [KeptCompletion([1], True)])
    found.load(torch.load(path, weights_only=True))
    assert len(found) == 2
    assert "old" not in found
    for mine, other in zip(
        found.rollout(["b", "a"], PAD, CPU), kept().rollout(["b", "a"], PAD, CPU), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_empty_state_loads_as_empty() -> None:
    found = kept()
    found.load(KeptCompletions().state())
    assert len(found) == 0
