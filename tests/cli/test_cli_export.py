"""The export command: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RunCli = Callable[..., None]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def other(fit_args: list[str]) -> Callable[..., list[str]]:
    """The arguments of another command on the same model."""
    return lambda command, *extra: [command, *fit_args[1:], *extra]


def test_exported_folder_loads_in_transformers_with_the_checkpoints_logits(
    run_cli: RunCli,
    fit_args: list[str],
    other: Callable[..., list[str]],
    tmp_path: Path,
    model: Any,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_cli(*fit_args, "--model.optimizer.lr=0.01")
    run_cli(*other("export", "--ckpt_path=last", "--output_dir=out"))
    checkpoint = torch.load(tmp_path / "runs/a/checkpoints/last.ckpt", weights_only=True)
    trained = {
        name.removeprefix("student."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("student.")
    }
    ids = torch.arange(5, 15).unsqueeze(0)
    with torch.no_grad():
        base = model(input_ids=ids).logits
        model.load_state_dict(trained)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(exported(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.equal(exported(input_ids=ids).logits, base)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_export_refuses_an_existing_folder_and_a_missing_checkpoint(
    run_cli: RunCli,
    fit_args: list[str],
    other: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_cli(*fit_args)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    for options, words in (
        (["--ckpt_path=last", "--output_dir=out"], ["output_dir: out exists", "--output_dir"]),
        ([], ["ckpt_path", "--ckpt_path=last"]),
    ):
        with pytest.raises(SystemExit) as stop:
            run_cli(*other("export", *options))
        message = capsys.readouterr().err
        assert stop.value.code == 2
        assert all(word in message for word in words), message
    assert files(tmp_path / "out") == {"mine.txt"}
    run_cli(*other("export", "--ckpt_path=last"))
    assert "model.safetensors" in files(tmp_path / "runs" / "a" / "exported" / "last")
