"""Supervised fine-tuning: cross-entropy of the demonstration with its stop token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional

from sdft_lightning.errors import UserError
from sdft_lightning.modules import SFTModule
from sdft_lightning.modules.evaluation import Evaluation

FitModule = Callable[..., Any]

ROWS = [
    {"id": "short", "prompt": "Q?", "demonstration": "No.", "reference": ["No"]},
    {
        "id": "long",
        "prompt": "A longer one?",
        "demonstration": "Quite some.",
        "reference": ["some"],
    },
]


class Recorder(L.Callback):
    """Keeps the first batch, its loss and its gradients."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients = [each.grad.double().clone() for each in module.student.parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.loss, self.batch = float(outputs["loss"]), args[0]


def test_loss_is_the_mean_over_rows_of_each_rows_mean_cross_entropy_with_its_stop_token(
    fit_module: FitModule, write_rows: Callable[..., Path], model: Any, tokenizer: Any
) -> None:
    recorder = Recorder()
    fit_module(SFTModule, data={"train": str(write_rows(ROWS))}, callbacks=[recorder])
    student, rows = model.double(), []
    for row in recorder.batch.rows:
        prompt = f"<|im_start|>user\n{row.prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        answer = row.demonstration[0]["content"] + "<|im_end|>"
        before, target = (
            torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
            for text in (prompt, answer)
        )
        ids = torch.cat([before, target]).unsqueeze(0)  # (1, P + T)
        logits = student(input_ids=ids).logits[0, len(before) - 1 : -1]  # (T, V)
        rows.append(functional.cross_entropy(logits, target))
    loss = torch.stack(rows).mean()
    loss.backward()

    assert {row.id for row in recorder.batch.rows} == {"short", "long"}
    assert recorder.loss == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.cat([each.grad.flatten() for each in student.parameters()])
    found = torch.cat([each.flatten() for each in recorder.gradients])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_pad_equal_to_eos_keeps_one_stop_token_a_row_in_the_target(
    fit_module: FitModule, write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    recorder = Recorder()
    fit_module(SFTModule, data={"train": str(write_rows(ROWS))}, callbacks=[recorder])
    ids, mask = recorder.batch.demonstration_ids, recorder.batch.demonstration_mask
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert not mask.all()
    for row_ids, row_mask in zip(ids, mask, strict=True):
        target = row_ids[row_mask].tolist()
        assert target.count(tokenizer.eos_token_id) == 1
        assert target[-1] == tokenizer.eos_token_id


def test_sft_learns_its_demonstrations(fit_module: FitModule) -> None:
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            losses.append(float(outputs["loss"]))

    module = fit_module(
        SFTModule,
        model={"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01)},
        max_steps=20,
        callbacks=[Losses()],
    )
    assert losses[-1] < losses[0] / 2
    # Counts of a step hold no weights.
    assert set(dict(module.named_children())) == {"student", "step_values"}


def test_teacher_is_not_graded_where_there_is_none() -> None:
    with pytest.raises(UserError, match=r"model\.evaluation\.teacher_in_fit: got true, and SFTM"):
        SFTModule(evaluation=Evaluation(teacher_in_fit=True))
