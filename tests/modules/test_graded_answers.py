"""Graders, logs and predictions of a model that thinks before it answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from sdft_lightning.callbacks import CompletionLog
from sdft_lightning.data import Columns, DemonstrationDataModule
from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.forward.policy import Policy
from sdft_lightning.modules import SDFTModule, evaluation
from sdft_lightning.types import Rollout

IM_END = 2


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Callable[[str], None]:
    """Let every greedy answer be one text."""

    def say(text: str) -> None:
        ids = torch.tensor([*tokenizer(text, add_special_tokens=False).input_ids, IM_END])

        def rollout(model: Any, prompt_ids: Any, *rest: Any) -> Rollout:
            rows = len(prompt_ids)
            completion = ids.expand(rows, -1)  # (B, T)
            mask = torch.ones_like(completion).bool()
            return Rollout(completion, mask, torch.zeros(mask.shape), torch.zeros(rows).bool())

        monkeypatch.setattr(evaluation, "greedy_rollout", rollout)

    return say


@pytest.fixture
def run(
    model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[L.Trainer, Any, Any]]:
    """A trainer with a module and graded rows."""

    def build(**data: Any) -> tuple[L.Trainer, Any, Any]:
        rows = [{"prompt": "Q?", "demonstration": "It is 2.", "reference": "It is 2."}] * 2
        path = str(write_rows(rows))
        module = SDFTModule(policy=Policy(str(model_folder), sampling_dtype="same"))
        options: dict[str, Any] = {
            "grader": "exact",
            "columns": Columns(reference="reference"),
            "prompts": PromptStyle("turns"),
            **data,
        }
        loaded = DemonstrationDataModule(
            model_name=str(model_folder), validation=path, predict=path, **options
        )
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[CompletionLog()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        return trainer, module, loaded

    return build


def accuracy(trainer: L.Trainer, module: Any, data: Any, role: str = "accuracy") -> float:
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    return float(found[f"val/task/task/{role}"])


@pytest.mark.parametrize(
    ("text", "graded", "with_thoughts"),
    [
        ("<think>No.</think>It is 2.", 1.0, 0.0),
        ("It is 2.", 1.0, 1.0),
        ("<think>It is 2.", 0.0, 0.0),
    ],
)
def test_graders_of_student_and_teacher_are_spared_thoughts_unless_asked(
    text: str, graded: float, with_thoughts: float, run: Any, says: Callable[[str], None]
) -> None:
    says(text)
    for role in ("accuracy", "teacher_accuracy"):
        assert accuracy(*run(), role) == graded
        assert accuracy(*run(grade_thoughts=True), role) == with_thoughts


def test_thought_that_the_prompt_opens_is_left_out_and_no_answer_behind_it_is_none(
    run: Any, says: Callable[[str], None]
) -> None:
    style = PromptStyle("turns", chat_template_args={"enable_thinking": True})
    says("No.</think>It is 2.")
    assert accuracy(*run(prompts=style)) == 1.0
    says("It is 2.")
    assert accuracy(*run(prompts=style)) == 0.0
    assert accuracy(*run(prompts=style, grade_thoughts=True)) == 1.0


def test_length_and_distinctness_are_of_the_answers_that_are_graded(
    run: Any, says: Callable[[str], None]
) -> None:
    says("<think>No.</think>it is it is it is")  # five pairs, two of them different
    assert accuracy(*run(), "answer_words") == 6.0
    assert accuracy(*run(), "answer_distinct_2") == pytest.approx(2 / 5)
    assert accuracy(*run(grade_thoughts=True), "answer_words") > 6.0
    says("it")
    assert accuracy(*run(), "answer_distinct_2") == 1.0


def test_log_shows_what_was_said_and_a_prediction_its_answer_too(
    run: Any, says: Callable[[str], None], tmp_path: Path
) -> None:
    says("<think>No.</think>It is 2.")
    trainer, module, data = run()
    trainer.validate(module, datamodule=data, verbose=False)
    (log,) = tmp_path.rglob("completions.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert {line["completion"] for line in lines} == {"<think>No.</think>It is 2."}
    assert {line["score"] for line in lines} == {1.0}
    (first, _), *_ = trainer.predict(module, datamodule=data)
    assert first["completion"] == "<think>No.</think>It is 2."
    assert first["answer"] == "It is 2."
    says("It is 2.")
    (first, _), *_ = trainer.predict(module, datamodule=data)
    assert "answer" not in first


def test_gold_self_test_spares_graders_the_demonstrations_thoughts(
    run: Any, write_rows: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "Q?", "demonstration": "<think>No.</think>It is 2.", "reference": "It is 2."}
    path = str(write_rows([row], "gold.jsonl"))
    for thoughts, right in ((False, 1), (True, 0)):
        _, _, data = run(grade_thoughts=thoughts)
        own = DemonstrationDataModule(
            model_name=data.model_name,
            validation=path,
            grader="exact",
            columns=Columns(reference="reference"),
            grade_thoughts=thoughts,
        )
        with caplog.at_level("INFO"):
            own.setup("validate")
        assert f"the demonstrations themselves get {right} of 1 right" in caplog.text
        caplog.clear()
