"""Packed linear layers: the same tokens, and nothing left behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdft_lightning.models.lora import adapter_layers, merged_copy, merged_weight
from sdft_lightning.models.precision import multiplies_bfloat16
from sdft_lightning.rollout import Sampling, generate_rollout
from sdft_lightning.rollout import decode_mode as decode_file
from sdft_lightning.rollout.decode_mode import packed_linears
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.rollout.student import StudentPasses
from sdft_lightning.types import Tokens

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.fixture(params=["native", "float32"])
def multiplied(request: pytest.FixtureRequest) -> None:
    """bfloat16 as this processor multiplies it, and as one that does not."""
    if request.param == "float32":
        request.getfixturevalue("no_bfloat16_products")
    elif not multiplies_bfloat16():
        pytest.skip("oneDNN does not multiply bfloat16 on this processor")


def count_packings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each rollout from now on packs layers; none is fused, which would come first."""
    packings: list[bool] = []

    @contextmanager
    def spy(model: Any, rows: int, steps: int) -> Iterator[None]:
        with packed_linears(model, rows, steps):
            packings.append(any("forward" in each.__dict__ for each in model.modules()))
            yield

    monkeypatch.setattr(decode_file, "decoder_of", lambda _: None)
    monkeypatch.setattr(decode_file, "packed_linears", spy)
    return packings


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
@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize("rows", [1, 16])
def test_a_packed_bfloat16_layer_gives_the_same_outputs(rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(24, 40, bias=True, dtype=torch.bfloat16))
    inputs = torch.randn(rows, 5, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = layer(inputs)
        with packed_linears(layer, rows, 100):
            assert "forward" in layer[0].__dict__
            packed = layer(inputs)
    assert packed.dtype == torch.bfloat16
    torch.testing.assert_close(packed, plain)


@needs_onednn
@pytest.mark.parametrize(("rows", "steps"), [(16, 100), (500, 100), (16, 2)])
def test_bfloat16_that_is_slow_is_laid_out_in_float32_whatever_the_size(
    no_bfloat16_products: None, monkeypatch: pytest.MonkeyPatch, rows: int, steps: int
) -> None:
    laid_out: list[torch.dtype] = []
    operator = torch.ops.mkldnn._reorder_linear_weight

    def spy(weight: Tensor, count: int) -> Any:
        laid_out.append(weight.dtype)
        return operator(weight, count)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", spy)
    layer = nn.Sequential(nn.Linear(24, 40, dtype=torch.bfloat16))
    inputs = torch.randn(rows, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = layer.float()(inputs.float())
        with packed_linears(layer.bfloat16(), rows, steps):
            packed = layer(inputs)
    assert laid_out == [torch.float32]
    assert torch.equal(packed, exact.bfloat16())


@needs_onednn
@pytest.mark.usefixtures("multiplied")
def test_a_rollout_of_the_bfloat16_copy_samples_the_same_tokens_as_without(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (4, 6))
    mask = torch.ones_like(ids, dtype=torch.bool)
    sampling = Sampling(max_new_tokens=12)
    uniforms = row_uniforms(0, 0, ["a", "b", "c", "d"], 1, 12)
    packings = count_packings(monkeypatch)
    packed = generate_rollout(copied, Tokens(ids, mask), sampling, uniforms, [2], 0)
    assert packings == [True]
    monkeypatch.setattr(decode_file, "packed_linears", lambda *_: nullcontext())
    plain = generate_rollout(copied, Tokens(ids, mask), sampling, uniforms, [2], 0)
    assert packed.completion_ids.tolist() == plain.completion_ids.tolist()
    torch.testing.assert_close(packed.sampled_log_probs, plain.sampled_log_probs)


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
    [(65, 100, torch.float32), (4, 7, torch.float32), (4, 100, torch.float16)],
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
    packings = count_packings(monkeypatch)
    packed = generate_rollout(model, Tokens(ids, mask), sampling, uniforms, [2], 0)
    assert packings == [True]
    monkeypatch.setattr(decode_file, "packed_linears", lambda *_: nullcontext())
    plain = generate_rollout(model, Tokens(ids, mask), sampling, uniforms, [2], 0)
    assert packed.completion_ids.tolist() == plain.completion_ids.tolist()
    torch.testing.assert_close(packed.sampled_log_probs, plain.sampled_log_probs)


@needs_onednn
def test_an_adapted_layer_is_packed_with_its_adapter_merged(
    make_adapted: Callable[..., Any],
) -> None:
    adapted = make_adapted()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        expected = merged_copy(adapted)(input_ids=ids).logits
        with packed_linears(adapted, 1, 100):
            layers = adapter_layers(adapted).values()
            assert all("forward" in layer.__dict__ for layer in layers)
            assert not any("forward" in layer.get_base_layer().__dict__ for layer in layers)
            # The adapter is in the weights that were laid out: what it is now does not matter.
            for layer in layers:
                layer.lora_B["default"].weight.mul_(100.0)
            packed = adapted(input_ids=ids).logits
        changed = adapted(input_ids=ids).logits
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, expected, rtol=1e-2)
    assert not any("forward" in part.__dict__ for part in adapted.modules())


@needs_onednn
@pytest.mark.usefixtures("multiplied")
def test_adapted_layers_of_the_bfloat16_copy_are_packed_in_its_precision(
    make_adapted: Callable[..., Any],
) -> None:
    copied = StudentPasses("bfloat16").at(make_adapted(), 0).sampler()
    layer = next(iter(adapter_layers(copied).values()))
    inputs = torch.randn(2, layer.get_base_layer().in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = inputs.float() @ merged_weight(layer).T
        with packed_linears(copied, 1, 100):
            packed = layer(inputs)
    assert packed.dtype == torch.bfloat16
    torch.testing.assert_close(packed.float(), expected, rtol=2e-2, atol=2e-2)
