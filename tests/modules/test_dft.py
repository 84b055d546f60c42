"""Dynamic fine-tuning: each token's cross-entropy times its own detached probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.modules import DFTModule, SFTModule
from sdft_lightning.types import PromptBatch

FitModule = Callable[..., Any]


class Recorder(L.Callback):
    """Keeps the first batch, its loss and its gradients."""

    gradients: list[Tensor]
    batch: PromptBatch
    loss: float

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients = [each.grad.double().clone() for each in module.student.parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.loss, self.batch = float(outputs["loss"]), args[0]
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


def target_log_probs(model: Any, batch: PromptBatch, row: int) -> Tensor:
    """Log-probabilities `(T,)` of one demonstration's tokens; no padding."""
    prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
    target = batch.demonstration_ids[row][batch.demonstration_mask[row]]
    ids = torch.cat([prompt, target]).unsqueeze(0)  # (1, P + T)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]  # (T, V)
    log_probs: Tensor = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    return log_probs


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_of_a_step_equal_the_formula_in_float64(
    tied: bool,
    fit_module: FitModule,
    make_model: Callable[..., Any],
    make_model_folder: Callable[..., Any],
) -> None:
    folder = make_model_folder(tie_word_embeddings=tied)
    recorder = Recorder()
    fit_module(
        DFTModule,
        model={"policy": {"name": str(folder)}},
        data={"batch_size": 4},
        callbacks=[recorder],
    )
    student = make_model(tie_word_embeddings=tied).double()
    rows = []
    for row in range(4):
        log_probs = target_log_probs(student, recorder.batch, row)  # (T,)
        rows.append(-(log_probs.detach().exp() * log_probs).mean())
    loss = torch.stack(rows).mean()
    loss.backward()

    assert recorder.loss == pytest.approx(loss.item(), rel=1e-5)
    found = flat(recorder.gradients)
    expected = flat([each.grad for each in student.parameters()])
    assert len(list(student.parameters())) == len(recorder.gradients)
    assert torch.cosine_similarity(found, expected, dim=0) > 1 - 1e-8
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=1e-5)


def test_dft_logs_the_cross_entropy_that_sft_has_for_its_loss(fit_module: FitModule) -> None:
    dft, sft = Recorder(), Recorder()
    data = {"batch_size": 1}
    fit_module(DFTModule, data=data, callbacks=[dft])
    fit_module(SFTModule, data=data, callbacks=[sft])
    assert dft.logged["train/cross_entropy"] == pytest.approx(sft.loss, rel=1e-5)
    assert dft.loss < 0.5 * sft.loss  # a random model gives its targets little probability
    assert torch.cosine_similarity(flat(dft.gradients), flat(sft.gradients), dim=0) < 0.99


def test_dft_learns_its_demonstrations_and_keeps_no_second_model(fit_module: FitModule) -> None:
    entropies: list[float] = []

    class CrossEntropies(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            entropies.append(float(trainer.callback_metrics["train/cross_entropy"]))

    module = fit_module(
        DFTModule,
        model={"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01)},
        max_steps=40,
        callbacks=[CrossEntropies()],
    )
    assert min(entropies[-5:]) < entropies[0] / 2
    # Counts of a step hold no weights.
    assert set(dict(module.named_children())) == {"student", "step_values"}
