"""4-bit weights below adapters: refused with a remedy where they cannot be; real ones on a GPU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.lora import LoRA, adapter_parameters
from sdft_lightning.models.precision import quantization_options


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Pretend that bitsandbytes is installed, or that it is not."""
    find = importlib.util.find_spec

    def pretend(there: bool) -> None:
        spec = importlib.machinery.ModuleSpec("bitsandbytes", None) if there else None

        def found(name: str, *rest: Any) -> Any:
            return spec if name == "bitsandbytes" else find(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", found)

    return pretend


def test_without_quantization_nothing_is_asked_of_transformers() -> None:
    assert quantization_options(None) == {}


def test_quantization_without_adapters_is_refused(model_folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.policy.quantization: got nf4 without model\.policy.lora"
    ):
        load_policy(Policy(str(model_folder), quantization="nf4"))


def test_missing_bitsandbytes_names_the_extra(
    model_folder: Path, installed: Callable[[bool], None]
) -> None:
    installed(False)
    with pytest.raises(
        UserError, match=r"model\.policy.quantization.*pip install -e '\.\[qlora\]'"
    ):
        load_policy(Policy(str(model_folder), lora=LoRA(), quantization="nf4"))


def test_a_machine_without_cuda_is_told_so(
    model_folder: Path, installed: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"model\.policy.quantization: nf4 needs a CUDA device"):
        load_policy(Policy(str(model_folder), lora=LoRA(), quantization="nf4"))


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"model\.policy.quantization: got 'int3', allowed are nf4, fp4"
    ):
        quantization_options("int3")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_are_4_bit_and_adapters_float32_and_trained(model_folder: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = load_policy(Policy(str(model_folder), lora=LoRA(r=4), quantization="nf4")).model
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.get_base_layer(), bitsandbytes.nn.Linear4bit)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    ids = torch.arange(5, 15, device=model.device).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in adapter_parameters(model).items() if ".lora_B." in n]
    assert all(float(grad.abs().max()) > 0 for grad in grads)
