"""Exports of a run with adapters: a whole model, or a folder of peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

RunCli = Callable[..., None]
IDS = torch.arange(5, 15).unsqueeze(0)
LORA = ["--model.policy.lora.r=4", "--model.optimizer=AdamW", "--model.optimizer.lr=0.05"]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.fixture
def trained(run_cli: RunCli, fit_args: list[str], tmp_path: Path, make_adapted: Any) -> Any:
    """The student of a run whose checkpoints lie in runs/a, and its arguments."""
    run_cli(*fit_args, *LORA)
    checkpoint = torch.load(tmp_path / "runs/a/checkpoints/last.ckpt", weights_only=True)
    student = make_adapted(moved=False)
    state = {
        name.removeprefix("student."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("student.")
    }
    assert not student.load_state_dict(state, strict=False).unexpected_keys
    return student


def test_merged_export_is_a_plain_model_with_the_adapters_logits(
    trained: Any, run_cli: RunCli, fit_args: list[str], tmp_path: Path, model: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_cli("export", *fit_args[1:], *LORA, "--ckpt_path=last", "--output_dir=out")
    assert not list((tmp_path / "out").glob("adapter*"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {n for n, _ in exported.named_parameters()} == {n for n, _ in model.named_parameters()}
    expected = logits(trained)
    torch.testing.assert_close(logits(exported), expected, rtol=0, atol=1e-4)
    assert float((expected - logits(model)).abs().max()) > 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_adapter_export_loads_in_peft_with_the_adapters_logits(
    trained: Any,
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    model: Any,
    model_folder: Path,
) -> None:
    from peft import PeftModel

    arguments = [*fit_args[1:], *LORA, "--ckpt_path=last", "--output_dir=out"]
    run_cli("export", *arguments, "--format=adapter")
    folder = tmp_path / "out"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not list(folder.glob("model*.safetensors"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    assert config["target_modules"] == sorted(config["target_modules"])
    expected = logits(trained)
    assert float((expected - logits(model)).abs().max()) > 1e-2
    found = logits(PeftModel.from_pretrained(model, folder))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_callback_exports_an_adapter(run_cli: RunCli, fit_args: list[str], tmp_path: Path) -> None:
    callback = ["--trainer.callbacks+=ExportModel", "--trainer.callbacks.format=adapter"]
    run_cli(*fit_args, *LORA, *callback)
    names = {path.name for path in (tmp_path / "runs/a/exported/final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names


@pytest.mark.parametrize("command", ["fit", "export"])
def test_adapter_format_without_adapters_is_refused_before_training(
    command: str,
    run_cli: RunCli,
    fit_args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "fit":
        extra = ["--trainer.callbacks+=ExportModel", "--trainer.callbacks.format=adapter"]
    else:
        run_cli(*fit_args)
        extra = ["--ckpt_path=last", "--output_dir=out", "--format=adapter"]
    with pytest.raises(SystemExit) as stop:
        run_cli(command, *fit_args[1:], *extra)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "format: got adapter" in message
    assert "--model.policy.lora.r=8" in message
    assert not (tmp_path / "out").exists()
    assert command == "export" or not list(tmp_path.glob("runs/a/checkpoints/*"))


def test_merged_format_of_quantized_weights_names_the_other() -> None:
    from sdft_lightning.callbacks.export import check_format
    from sdft_lightning.errors import UserError
    from sdft_lightning.forward.policy import Policy
    from sdft_lightning.models.lora import LoRA
    from sdft_lightning.modules import SFTModule

    module = SFTModule(policy=Policy(lora=LoRA(), quantization="nf4"))
    check_format(module, "adapter")
    with pytest.raises(UserError, match=r"format: got merged.*--format=adapter"):
        check_format(module, "merged")
