"""bfloat16 where the hardware has none: told before minutes are lost."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from sdft_lightning.forward.hidden import completion_hidden_states
from sdft_lightning.forward.policy import Policy
from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.models.lora import LoRA, adapter_parameters
from sdft_lightning.modules import SDFTModule, student_checks, window
from sdft_lightning.types import Tokens


@pytest.mark.parametrize(
    ("name", "weights", "native", "named"),
    [
        ("bf16-mixed", torch.float32, False, "trainer.precision: bf16-mixed"),
        ("bf16-true", torch.bfloat16, False, "trainer.precision: bf16-true"),
        ("32-true", torch.bfloat16, False, "model.policy.weights_dtype: bfloat16"),
        ("bf16-mixed", torch.float32, True, None),
        ("bf16-true", torch.bfloat16, True, None),
        ("32-true", torch.float32, False, None),
        ("16-mixed", torch.float32, False, None),
    ],
)
def test_only_bfloat16_without_hardware_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    weights: torch.dtype,
    native: bool,
    named: str | None,
) -> None:
    monkeypatch.setattr(student_checks, "has_native_bfloat16", lambda device: native)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        student_checks.warn_of_slow_precision(name, torch.device("cpu"), weights)
    assert [str(each.message).partition(" on a")[0] for each in caught] == [named] * bool(named)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_warning_says_what_bfloat16_costs_here(
    monkeypatch: pytest.MonkeyPatch, either_processor: bool, weights: torch.dtype
) -> None:
    monkeypatch.setattr(student_checks, "has_native_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="32-true") as caught:
        student_checks.warn_of_slow_precision("bf16-mixed", torch.device("cpu"), weights)
    (text,) = (str(each.message) for each in caught)
    rounded = weights == torch.bfloat16
    assert ("a step takes longer than in float32" in text) is either_processor
    assert ("products are made in float32" in text) is not either_processor
    assert ("other than Llama" in text) is (rounded and not either_processor)
    assert ("--model.policy.weights_dtype=float32" in text) is rounded


def test_fit_warns_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., None], fit_args: list[str]
) -> None:
    monkeypatch.setattr(student_checks, "has_native_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="--trainer.precision=32-true"):
        run_cli(*fit_args, "--trainer.precision=bf16-mixed", "--trainer.max_steps=1")


def rotary_frequencies(model: Any) -> torch.Tensor:
    frequencies: torch.Tensor = model.model.rotary_emb.inv_freq
    return frequencies


def test_bf16_true_rounds_the_students_weights_and_not_its_rotary_frequencies(
    fit_module: Callable[..., Any],
) -> None:
    module = fit_module(precision="bf16-true")
    assert {each.dtype for each in module.student.parameters()} == {torch.bfloat16}
    mine = rotary_frequencies(module.student)
    assert mine.dtype == torch.float32
    assert torch.equal(mine, rotary_frequencies(module.teacher.network))
    assert not torch.equal(mine, mine.bfloat16().float())  # else rounding would go unnoticed


def test_after_a_cast_both_roles_see_the_same_far_positions(model_folder: Path) -> None:
    module = SDFTModule(policy=Policy(str(model_folder), weights_dtype="bfloat16"))
    module.configure_model()
    module.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 260, (1, 2000), generator=generator)  # (1, P)
    answer = torch.randint(5, 260, (1, 8), generator=generator)  # (1, T)
    masks = torch.ones_like(ids).bool(), torch.ones_like(answer).bool()
    given = ids, masks[0], answer, masks[1], masks[1]
    with torch.no_grad():
        student = completion_hidden_states(
            module.student, Tokens(*given[:2]), Tokens(*given[2:4]), given[4]
        )  # (N, D)
    _, tokens = bounded_divergence(
        module.teacher(Tokens(*given[:2]), Tokens(*given[2:4]), given[4]),
        module.teacher.gather_head(),
        student,
        module.gather_head(),
        answer[0],
        torch.full((8,), 1 / 8),
        Divergence(),
        1.0,
    )
    # bfloat16 arithmetic leaves 0.0017; with rounded frequencies it is 0.032.
    assert float(tokens.kl.mean()) < 5e-3


def test_bf16_true_leaves_adapters_float32(fit_module: Callable[..., Any]) -> None:
    module = fit_module(model={"policy": {"lora": LoRA(r=2)}}, precision="bf16-true")
    adapters = adapter_parameters(module.student)
    assert {each.dtype for each in adapters.values()} == {torch.float32}
    rest = [p for name, p in module.student.named_parameters() if name not in adapters]
    assert {each.dtype for each in rest} == {torch.bfloat16}
    # A first step of AdamW moves B by the learning rate; bfloat16 would hold none of its digits.
    assert any(not torch.equal(p, p.bfloat16().float()) for p in adapters.values())


@pytest.mark.parametrize("fused", [True, False])
def test_bf16_mixed_clips_the_gradients_of_any_optimizer(
    fit_module: Callable[..., Any], fused: bool
) -> None:
    norms = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            if closure is None:  # the one that measures the effective update
                return super().step()
            loss = closure()
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            return super().step(lambda: loss)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return Watched(parameters, lr=1e-3, fused=fused)

    fit_module(model={"optimizer": optimizer}, precision="bf16-mixed", gradient_clip_val=1e-3)
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


def test_float16_still_refuses_to_clip_for_an_optimizer_that_divides_by_the_scale_itself() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    fused = torch.optim.AdamW([weight], fused=True)
    scaled = MixedPrecision("16-mixed", "cpu")
    with window.clipping_without_scale(scaled), pytest.raises(RuntimeError, match="fused"):
        scaled.clip_gradients(fused, 1.0)
    unscaled = MixedPrecision("bf16-mixed", "cpu")
    with window.clipping_without_scale(unscaled):
        unscaled.clip_gradients(fused, 1.0)
    assert float(weight.grad.norm()) == pytest.approx(1.0)
    with pytest.raises(RuntimeError, match="fused"):  # outside all is Lightning's again
        unscaled.clip_gradients(fused, 1.0)


class CachingAutocast(MixedPrecision):
    """Casts each weight once in a whole training step, rollout included."""

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=True)


class Casts(TorchDispatchMode):
    """Counts tensors of each shape that are cast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.shapes[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("bfloat16_products")
def test_a_rollout_under_autocast_leaves_the_weights_their_gradients(
    fit_module: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' own layers, as fused ones cast their weights themselves
    monkeypatch.setattr("sdft_lightning.forward.hidden.training_dtype", lambda model: None)
    casts = Casts()
    found: dict[str, torch.Tensor] = {}

    class Watched(SDFTModule):
        def student_hidden(self, *args: Any) -> torch.Tensor:
            with casts:
                return super().student_hidden(*args)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            named = self.student.named_parameters()
            found.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    fit_module(Watched, plugins=[MixedPrecision("bf16-mixed", "cpu")])
    expected = dict(found)
    found.clear()
    casts.shapes.clear()
    fit_module(Watched, plugins=[CachingAutocast("bf16-mixed", "cpu")])
    # Gate and up of two layers: anew behind the rollout, and then once.
    assert casts.shapes[(64, 32)] == 4
    assert expected.keys() == found.keys()
    assert len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
