"""Packed linear layers: the same tokens, and nothing left behind."""

import pytest
import torch
from torch import nn

from sdft_lightning.rollout import Sampling, generate_rollout
from sdft_lightning.rollout import generate as generate_file
from sdft_lightning.rollout.packed import packed_linears
from sdft_lightning.uniforms import row_uniforms

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_packed_layer_gives_the_same_outputs(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(24, 40, bias=bias))
    inputs = torch.randn(rows, 5, 24)
    with torch.no_grad():
        plain = layer(inputs)
        with packed_linears(layer, rows, 100):
            assert "forward" in layer[0].__dict__
            packed = layer(inputs)
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-6)


@needs_onednn
def test_weights_that_changed_between_two_rollouts_are_packed_anew() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    inputs = torch.randn(2, 8)
    with torch.no_grad():
        with packed_linears(layer, 2, 100):
            layer(inputs)
        layer[0].weight.mul_(2.0)
        plain = layer(inputs)
        with packed_linears(layer, 2, 100):
            torch.testing.assert_close(layer(inputs), plain)


def test_the_layer_is_itself_again_also_after_an_error() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))

    def fail() -> None:
        with packed_linears(layer, 2, 100):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert "forward" not in layer[0].__dict__
    layer(torch.randn(2, 8)).sum().backward()
    assert layer[0].weight.grad is not None


@pytest.mark.parametrize(
    ("rows", "steps", "dtype"),
    [(65, 100, torch.float32), (4, 7, torch.float32), (4, 100, torch.bfloat16)],
)
def test_nothing_is_packed_where_it_would_not_pay(
    rows: int, steps: int, dtype: torch.dtype
) -> None:
    layer = nn.Sequential(nn.Linear(8, 8, dtype=dtype))
    with packed_linears(layer, rows, steps):
        assert "forward" not in layer[0].__dict__


@needs_onednn
def test_a_rollout_samples_the_same_tokens_as_without(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (4, 6))
    mask = torch.ones_like(ids, dtype=torch.bool)
    sampling = Sampling(max_new_tokens=12)
    uniforms = row_uniforms(0, 0, ["a", "b", "c", "d"], 1, 12)
    packed = generate_rollout(model, ids, mask, sampling, uniforms, [2], 0)
    monkeypatch.setattr(
        generate_file, "packed_linears", lambda model, rows, steps: packed_linears(model, 999, 0)
    )
    plain = generate_rollout(model, ids, mask, sampling, uniforms, [2], 0)
    assert packed.completion_ids.tolist() == plain.completion_ids.tolist()
    torch.testing.assert_close(packed.sampled_log_probs, plain.sampled_log_probs)
