"""The first notebook: from own demonstrations to an exported model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a kernel imports everything anew, on a busy machine slowly
]
Execute = Callable[..., Any]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(5, 15).unsqueeze(0)).logits
        return found


def test_quickstart_exports_the_model_that_it_has_trained(
    execute: Execute, model_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    keep = ["run", "exported", "verdict", "preflight", "training", "validations", "completions"]
    left = execute("01_quickstart.ipynb", [*keep, "answers", "student_prompt", "teacher_prompt"])
    (work,) = left.folders
    run, exported = Path(left["run"]), Path(left["exported"])
    assert work in run.parents
    assert run in exported.parents

    trained = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    base = logits(trained)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    student = {
        name.removeprefix("student."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("student.")
    }
    trained.load_state_dict(student)
    found = logits(AutoModelForCausalLM.from_pretrained(exported).eval())
    assert torch.equal(found, logits(trained))
    assert not torch.equal(found, base)

    assert left["verdict"] in ("go", "warn", "use SFT")
    assert left["preflight"]["rows"] == 18
    assert [line["step"] for line in left["training"]] == [1, 2]
    assert all(line["train/loss"] > 0 for line in left["training"])
    assert [line["step"] for line in left["validations"]] == [1, 2]
    assert {line["stage"] for line in left["completions"]} == {"train", "validation"}
    assert len(left["answers"]) == 3
    assert "Monday" in left["teacher_prompt"]
    assert "Monday" not in left["student_prompt"]
    assert left.pictures == 1
