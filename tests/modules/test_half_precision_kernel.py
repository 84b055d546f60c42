"""Attention that takes half precision only, as flash_attention_2 does, in low precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sdft_lightning.callbacks import DriftMonitor
from sdft_lightning.data.sets import HeldOut
from sdft_lightning.errors import UserError
from sdft_lightning.models.lora import LoRA
from sdft_lightning.modules import SDFTModule
from sdft_lightning.teacher import EMATeacher, FrozenTeacher, LiveTeacher

NAME, NAIVE = "half_only", "half_only_naive"


def naive(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if query.dtype == torch.float32:
        raise RuntimeError("only supports fp16 and bf16")
    return sdpa_attention_forward(module, query, *args, **kwargs)


def half_only(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
    """Casts back what rotary positions have promoted, like transformers' flash attention."""
    dtype = get_target_dtype(q, module) or q.dtype
    return naive(module, q.to(dtype), k.to(dtype), v.to(dtype), *args, **kwargs)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    for name, kernel in ((NAME, half_only), (NAIVE, naive)):
        AttentionInterface.register(name, kernel)
        AttentionMaskInterface.register(name, sdpa_mask)
    yield
    for name in (NAME, NAIVE):
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


@pytest.mark.parametrize("teacher", [EMATeacher, FrozenTeacher, LiveTeacher])
@pytest.mark.parametrize(
    ("precision", "kernel"), [("bf16-mixed", NAME), ("bf16-true", NAME), ("bf16-true", NAIVE)]
)
def test_a_kernel_of_half_precision_passes_the_check_and_a_step(
    precision: str, kernel: str, teacher: Any, fit_module: Callable[..., Any]
) -> None:
    before: dict[str, torch.Tensor] = {}

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        before["first"] = parameters[0].detach().clone()
        return torch.optim.SGD(parameters, lr=1.0)

    module = fit_module(
        model={
            "policy": {"attn_implementation": kernel},
            "optimizer": optimizer,
            "teacher": teacher(),
        },
        precision=precision,
    )
    assert module.student.config._attn_implementation == kernel
    assert not torch.equal(next(module.student.parameters()), before["first"])


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_drift_is_measured_with_a_kernel_of_half_precision(
    precision: str, lora: LoRA | None, fit_module: Callable[..., Any], train_file: Any
) -> None:
    module = fit_module(
        model={"policy": {"attn_implementation": NAME, "lora": lora}},
        data={
            "held_out": {"general": HeldOut(str(train_file), "contains")},
            "validation": str(train_file),
        },
        callbacks=[DriftMonitor(["general"])],
        precision=precision,
        limit_val_batches=1,
        val_check_interval=1,
    )
    assert module.trainer.callback_metrics["val/drift/general"] >= 0


def test_in_float32_it_is_refused_in_a_sentence(fit_module: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"attn_implementation: half_only cannot.*32-true.*bf16-mi"):
        fit_module(model={"policy": {"attn_implementation": NAME}})


def test_the_check_runs_once_and_before_the_first_step(
    fit_module: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def check(model: Any) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), model.training))

    monkeypatch.setattr("sdft_lightning.modules.student_checks.check_model", check)
    monkeypatch.setattr(SDFTModule, "on_train_start", lambda self: seen.append("train"))
    fit_module(precision="bf16-mixed", num_sanity_val_steps=1)
    assert [each if each == "train" else each[0] for each in seen] == [True, "train"]
