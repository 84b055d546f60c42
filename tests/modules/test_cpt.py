"""Continued pre-training: the next token of the context, as plain text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional

from sdft_lightning.data import Columns, DemonstrationDataModule
from sdft_lightning.modules import CPTModule

FitModule = Callable[..., Any]
TEXTS = ["We open at 7:30.", "No."]


class Recorder(L.Callback):
    """Keeps the first batch, its loss and its gradients."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients = [each.grad.double().clone() for each in module.student.parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.loss, self.batch = float(outputs["loss"]), args[0]


def test_loss_and_gradient_are_those_of_the_next_token_of_the_plain_text(
    fit_module: FitModule, write_rows: Callable[..., Path], model: Any, tokenizer: Any
) -> None:
    # Plain texts: neither a question nor a demonstration in the file.
    path = write_rows([{"text": text} for text in TEXTS])
    recorder = Recorder()
    fit_module(
        CPTModule,
        data={"train": str(path), "columns": Columns(context="text")},
        callbacks=[recorder],
    )
    student, rows = model.double(), []
    for row in recorder.batch.rows:
        ids = tokenizer(row.context + "<|im_end|>", add_special_tokens=False).input_ids
        whole = torch.tensor([ids])  # (1, S); this tokenizer has no BOS
        logits = student(input_ids=whole).logits[0, :-1]  # (S - 1, V)
        rows.append(functional.cross_entropy(logits, whole[0, 1:]))
    loss = torch.stack(rows).mean()
    loss.backward()

    assert {row.context for row in recorder.batch.rows} == set(TEXTS)
    assert recorder.batch.prompt_ids.shape == recorder.batch.demonstration_ids.shape == (2, 0)
    assert recorder.loss == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.cat([each.grad.flatten() for each in student.parameters()])
    found = torch.cat([each.flatten() for each in recorder.gradients])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_validation_of_cpt_still_asks_questions_after_the_chat_template(
    fit_module: FitModule, train_file: Path
) -> None:
    asked: list[torch.Tensor] = []

    class Asked(L.Callback):
        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            asked.append(batch.prompt_ids)
            assert batch.context_ids.shape[1] == 0

    module = fit_module(
        CPTModule,
        data={
            "validation": str(train_file),
            "grader": "contains",
            "columns": Columns(context="context", reference="reference"),
        },
        val_check_interval=1,
        callbacks=[Asked()],
    )
    assert "val/task/task/accuracy" in module.trainer.callback_metrics
    assert module.tokenizer.decode(asked[0][0]).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_data_module_alone_asks_for_demonstrations_as_before(
    model_folder: Path, write_rows: Callable[..., Path]
) -> None:
    path = write_rows([{"text": text} for text in TEXTS])
    data = DemonstrationDataModule(
        str(model_folder), train=str(path), columns=Columns(context="text")
    )
    with pytest.raises(ValueError, match=r"data\.columns\.(prompt|demonstration)"):
        data.setup("fit")
