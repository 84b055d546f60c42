"""SFT with a penalty for leaving the initial model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.modules import SFTKLModule, SFTModule
from sdft_lightning.types import PromptBatch

FitModule = Callable[..., Any]


class Recorder(L.Callback):
    """Keeps batch, loss, gradients, logged values, and the weights before the last step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.before = copy.deepcopy(module.student.state_dict())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients = [each.grad.double().clone() for each in module.student.parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.batch: PromptBatch = args[0]
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


def fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


def log_probs(model: Any, batch: PromptBatch, row: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities `(T, V)` at the tokens of one demonstration, and the tokens `(T,)`."""
    prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
    target = batch.demonstration_ids[row][batch.demonstration_mask[row]]
    ids = torch.cat([prompt, target]).unsqueeze(0)  # (1, P + T)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]  # (T, V)
    return logits.log_softmax(-1), target


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
def test_loss_and_gradient_of_a_later_step_equal_the_formula_in_float64(
    direction: Any, fit_module: FitModule, model: Any
) -> None:
    recorder = Recorder()
    fit_module(
        SFTKLModule,
        model={"kl_weight": 0.7, "kl_direction": direction, "optimizer": fast},
        max_steps=4,
        callbacks=[recorder],
    )
    student, base = copy.deepcopy(model), model.double()
    student.load_state_dict(recorder.before)
    student, rows = student.double(), []
    penalties = []
    for row in range(2):
        with torch.no_grad():
            p, target = log_probs(base, recorder.batch, row)
        q, _ = log_probs(student, recorder.batch, row)
        kl = (p.exp() * (p - q)) if direction == "forward_kl" else (q.exp() * (q - p))
        entropy = -q.gather(-1, target[:, None])[:, 0]
        rows.append((entropy + 0.7 * kl.sum(-1)).mean())
        penalties.append((p.exp() * (p - q)).sum(-1))
    loss = torch.stack(rows).mean()
    loss.backward()

    assert recorder.losses[-1] == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.cat([each.grad.flatten() for each in student.parameters()])
    found = torch.cat([each.flatten() for each in recorder.gradients])
    assert torch.cosine_similarity(found, expected, dim=0) > 1 - 1e-7
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=1e-4)
    # Logged is KL(base ‖ student), whichever direction is trained on.
    kl = torch.cat(penalties).mean().item()
    assert kl > 0.05
    assert recorder.logged["train/kl"] == pytest.approx(kl, rel=1e-3)


def test_first_step_is_that_of_sft_since_the_student_is_still_the_base(
    fit_module: FitModule,
) -> None:
    ours, sft = Recorder(), Recorder()
    fit_module(SFTKLModule, model={"kl_weight": 5.0}, callbacks=[ours])
    fit_module(SFTModule, callbacks=[sft])
    assert ours.losses == pytest.approx(sft.losses, rel=1e-6)
    for mine, theirs in zip(ours.gradients, sft.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_a_greater_weight_keeps_the_student_nearer_to_the_base(fit_module: FitModule) -> None:
    def distance(weight: float) -> float:
        recorder = Recorder()
        fit_module(
            SFTKLModule,
            model={"kl_weight": weight, "optimizer": fast},
            max_steps=15,
            callbacks=[recorder],
        )
        return recorder.logged["train/kl"]

    assert distance(10.0) < 0.3 * distance(0.01)


def test_base_stays_frozen_in_float32_and_out_of_the_optimizer(fit_module: FitModule) -> None:
    module = fit_module(SFTKLModule, model={"optimizer": fast}, max_steps=3)
    fresh = fit_module(SFTKLModule).base.network.state_dict()
    for name, value in module.base.network.state_dict().items():
        assert torch.equal(value, fresh[name])
        assert not torch.equal(value, module.student.state_dict()[name])
        assert not value.requires_grad
    seen = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert seen == {id(parameter) for parameter in module.student.parameters()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kl_weight": 0.0}, ["model.kl_weight", "got 0.0", "above 0", "SFTModule"]),
        ({"kl_weight": float("nan")}, ["model.kl_weight", "nan"]),
        (
            {"kl_direction": "forward"},
            ["model.kl_direction", "'forward'", "forward_kl, reverse_kl"],
        ),
    ],
)
def test_wrong_penalty_names_option_value_and_what_is_allowed(
    options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        SFTKLModule(**options)
    assert all(word in str(error.value) for word in words)
