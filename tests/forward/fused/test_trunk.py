"""Fused blocks give the states and gradients of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.forward import hidden as hidden_file
from sdft_lightning.forward.fused import completion_states, decoder_of
from sdft_lightning.forward.fused import rows as rows_file
from sdft_lightning.forward.fused.attention import Buffers
from sdft_lightning.forward.hidden import completion_hidden_states
from sdft_lightning.forward.layout import split_prompts
from sdft_lightning.models import precision
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.types import Tokens

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
Make = Callable[..., Any]
Found = tuple[Tensor, dict[str, Tensor]]


def wanted(given: Batch) -> Tensor:
    keep = given[3].clone()
    keep[:, 0] = False  # as if the first token were left out of the loss
    return keep


def gradients(model: Any, states: Tensor) -> Found:
    draw = torch.Generator().manual_seed(2)
    model.zero_grad()
    (states * torch.randn(states.shape, generator=draw)).sum().backward()
    return states.detach(), {
        name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
    }


def fused(model: Any, given: Batch, dtype: torch.dtype = torch.float32) -> Found:
    ids, mask, completion_ids, completion_mask = given
    decoder = decoder_of(model)
    assert decoder is not None
    split = split_prompts(Tokens(ids, mask))
    keep = wanted(given)
    states = completion_states(decoder, split, Tokens(completion_ids, completion_mask), keep, dtype)
    return gradients(model, states)


def plain(model: Any, given: Batch) -> Found:
    keep = wanted(given)
    states = completion_hidden_states(
        model,
        Tokens(*given[:2]),
        Tokens(*given[2:]),
        keep,
        share_prefix=False,
        pack=False,
        fuse=False,
    )
    return gradients(model, states)


def assert_same(ours: Found, theirs: Found) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
    assert ours[1].keys() == theirs[1].keys()
    assert len(theirs[1]) > 20
    for name, gradient in theirs[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            ours[1][name] / scale, gradient / scale, atol=3e-5, rtol=0, msg=name
        )


@pytest.mark.parametrize("prefix", [0, 12])
def test_states_and_gradients_are_the_models(
    build: Make, batch: Make, kind: str, prefix: int
) -> None:
    model, given = build(kind), batch(prefix)
    assert split_prompts(Tokens(*given[:2])).prefix_ids.numel() == prefix
    assert_same(fused(model, given), plain(model, given))


@pytest.mark.parametrize(("scores", "queries"), [(1, 64), (300, 64), (2000, 3), (10**9, 2)])
def test_groups_and_blocks_of_any_size_change_nothing(
    build: Make, batch: Make, monkeypatch: pytest.MonkeyPatch, scores: int, queries: int
) -> None:
    model, given = build("llama"), batch()
    expected = plain(model, given)
    monkeypatch.setattr(rows_file, "_MOST_SCORES", scores)
    monkeypatch.setattr(rows_file, "_FEW_QUERIES", queries)
    assert_same(fused(model, given), expected)


def test_without_a_wanted_token_there_are_no_states_and_gradients_are_zero(
    build: Make, batch: Make
) -> None:
    model, (ids, mask, completion_ids, completion_mask) = build("llama"), batch()
    nothing = torch.zeros_like(completion_mask)
    decoder = decoder_of(model)
    assert decoder is not None
    split = split_prompts(Tokens(ids, mask))
    states = completion_states(
        decoder, split, Tokens(completion_ids, completion_mask), nothing, torch.float32
    )
    assert states.shape == (0, 32)
    _, found = gradients(model, states)
    assert all((gradient == 0).all() for gradient in found.values())


def test_rotary_positions_that_are_scaled_are_the_models(build: Make, batch: Make) -> None:
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model, given = build("llama", rope_parameters=scaled), batch()
    assert_same(fused(model, given), plain(model, given))


def test_in_bfloat16_they_are_as_near_to_float32_as_autocast(
    build: Make,
    batch: Make,
    kind: str,
    bfloat16_products: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, given = build(kind), batch()
    exact = plain(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        states = completion_hidden_states(
            model, Tokens(*given[:2]), Tokens(*given[2:]), wanted(given), fuse=False
        )
    autocast = gradients(model, states)
    ours = fused(model, given, torch.bfloat16)
    assert ours[0].dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr(precision, "multiplies_bfloat16", lambda: False)
        kept = fused(model, given, torch.bfloat16)

    def error(found: Found) -> float:
        both = [torch.cat([each.flatten() for each in one[1].values()]) for one in (found, exact)]
        return float((both[0] - both[1]).norm() / both[1].norm())

    assert 0 < error(ours) < 1.2 * error(autocast)
    difference = (ours[0] - exact[0]).norm() / (autocast[0] - exact[0]).norm()
    assert difference < 1.2
    # Multiplied in float32, as on a processor that has nothing else, they are nearer.
    assert 0 < error(kept) < error(ours)
    assert 0 < (kept[0] - exact[0]).norm() < (ours[0] - exact[0]).norm()


def test_activations_are_kept_in_bfloat16_and_weights_copied_only_to_be_rounded(
    build: Make, batch: Make, kind: str, either_processor: bool
) -> None:
    model, given = build(kind), batch()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused(model, given, torch.bfloat16)
    assert all(each.grad is None or each.grad.dtype == torch.float32 for each in model.parameters())
    # Gate and up, 96 numbers a token; a weight has as many rows, and is no copy.
    wide = [each for each in kept if each.shape[-1] == 96]
    assert {each.dtype for each in wide} == {torch.bfloat16}
    # Weights as they are, or a rounded copy of each.
    parameters = {each.data_ptr() for each in model.parameters()}
    down = [each for each in kept if each.shape == (32, 48)]
    assert len(down) == 3
    assert all((each.data_ptr() in parameters) is not either_processor for each in down)


@pytest.mark.parametrize(
    ("autocast", "fuse", "dtype", "used"),
    [
        (torch.bfloat16, True, torch.float32, torch.bfloat16),
        (None, True, torch.float32, torch.float32),
        (None, False, torch.float32, None),
        (torch.float16, True, torch.float32, None),
        (torch.bfloat16, True, torch.bfloat16, "if it is slow"),
        (None, True, torch.bfloat16, "if it is slow"),
        (None, True, torch.float16, None),
    ],
)
def test_they_are_used_for_float32_weights_also_under_bfloat16_autocast(
    build: Make,
    batch: Make,
    monkeypatch: pytest.MonkeyPatch,
    either_processor: bool,
    autocast: torch.dtype | None,
    fuse: bool,
    dtype: torch.dtype,
    used: torch.dtype | str | None,
) -> None:
    if isinstance(used, str):
        used = None if either_processor else torch.bfloat16
    model, given = build("llama").to(dtype), batch()
    calls = []

    def spy(*arguments: Any) -> Tensor:
        calls.append(arguments[4])
        return completion_states(*arguments)

    monkeypatch.setattr(hidden_file, "completion_states", spy)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        completion_hidden_states(
            model, Tokens(*given[:2]), Tokens(*given[2:]), wanted(given), fuse=fuse
        )
    assert calls == ([] if used is None else [used])


def test_without_gradients_nothing_is_kept_and_so_nothing_rounded(
    build: Make, batch: Make, either_processor: bool
) -> None:
    model, given = build("llama"), batch()
    with torch.no_grad():
        exact = completion_hidden_states(model, Tokens(*given[:2]), Tokens(*given[2:]), given[3])
        with torch.autocast("cpu", torch.bfloat16):
            found = completion_hidden_states(
                model, Tokens(*given[:2]), Tokens(*given[2:]), given[3]
            )
    assert torch.equal(found, exact) is not either_processor


def test_bfloat16_weights_are_multiplied_in_float32_and_never_copied_whole(
    build: Make, batch: Make, kind: str, no_bfloat16_products: None
) -> None:
    model, given = build(kind).bfloat16(), batch()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = completion_hidden_states(
            model, Tokens(*given[:2]), Tokens(*given[2:]), wanted(given)
        )
        ours = gradients(model, states)
    assert states.dtype == torch.float32
    assert {each.dtype for each in ours[1].values()} == {torch.bfloat16}
    parameters = {each.data_ptr() for each in model.parameters()}
    of_layers = [each for each in kept if each.shape in ((32, 32), (48, 32), (32, 48), (16, 32))]
    assert len(of_layers) >= 12
    assert all(each.data_ptr() in parameters for each in of_layers)
    theirs = plain(model, given)
    exact = plain(model.float(), given)

    def error(found: Found) -> float:
        both = [torch.cat([each.flatten() for each in one[1].values()]) for one in (found, exact)]
        return float((both[0].float() - both[1]).norm() / both[1].norm())

    assert 0 < error(ours) < error(theirs)
    assert 0 < (ours[0] - exact[0]).norm() < (theirs[0] - exact[0]).norm()


def test_a_rounded_copy_spares_the_cast_and_changes_nothing(
    build: Make, batch: Make, bfloat16_products: None
) -> None:
    model, given = build("llama"), batch()
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    found = []
    for rounded in (None, copied):
        with torch.autocast("cpu", torch.bfloat16):
            states = completion_hidden_states(
                model, Tokens(*given[:2]), Tokens(*given[2:]), wanted(given), rounded=rounded
            )
        found.append(gradients(model, states))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
    with torch.no_grad():
        copied.model.layers[0].mlp.down_proj.weight.zero_()  # it is really the copy that is used
    with torch.autocast("cpu", torch.bfloat16):
        states = completion_hidden_states(
            model, Tokens(*given[:2]), Tokens(*given[2:]), wanted(given), rounded=copied
        )
    assert not torch.equal(states, found[0][0])


def test_buffers_are_used_again_and_grow() -> None:
    buffers = Buffers()
    first = buffers.take("a", (2, 3))
    assert buffers.take("a", (3, 2)).data_ptr() == first.data_ptr()
    assert buffers.take("b", (2, 3)).data_ptr() != first.data_ptr()
    assert buffers.take("a", (4, 3)).shape == (4, 3)
    assert buffers.take("a", (4, 3), torch.bfloat16).dtype == torch.bfloat16
    given = torch.ones(2)
    assert buffers.cast("c", given, torch.float32) is given
    assert buffers.cast("c", given, torch.bfloat16).tolist() == [1.0, 1.0]
