"""The script of `docs/own_method.md` is run as it stands, on a smaller model."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs" / "own_method.md").read_text(encoding="utf-8")


def script() -> str:
    (found,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def test_divergence_teacher_and_module_are_under_60_lines_together() -> None:
    assert len(script().splitlines()) < 60


def test_script_trains_on_the_first_tokens_and_its_teacher_steps(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    code = script().replace('"embedded"', repr(str(model_folder)))
    assert code != script()
    exec(compile(code, "my_method.py", "exec"), names)

    model, trainer = names["model"], names["trainer"]
    assert trainer.global_step == 2
    # The second step is the teacher's: it is the student now, and no longer the model before.
    mine = dict(model.teacher.network.named_parameters())
    for name, weight in model.student.named_parameters():
        assert torch.equal(mine[name], weight)
        assert mine[name].data_ptr() != weight.data_ptr()
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert any(not torch.equal(mine[name], weight) for name, weight in base.named_parameters())

    ids = torch.full((1, 10), 100)
    batch = SimpleNamespace(prompt_ids=ids)
    rollout = SimpleNamespace(completion_ids=ids, completion_mask=torch.ones(1, 10).bool())
    assert model.loss_mask(batch, rollout).tolist() == [[True] * 4 + [False] * 6]

    rows = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).clamp(min=1e-9).log()
    other = torch.tensor([[0.25, 0.75], [0.0, 1.0]]).clamp(min=1e-9).log()
    found = names["total_variation"](rows, other, None)
    assert found.tolist() == pytest.approx([0.25, 1.0], abs=1e-6)
