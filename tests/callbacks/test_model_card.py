"""An exported folder differs from its base in weights, card and what the card names only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.callbacks.export import base_files, export_model, model_card, origin_of
from sdft_lightning.modules import SFTModule

RunCli = Callable[..., None]


@pytest.fixture
def base(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    """A bfloat16 model as people publish them, with files that no library wrote."""
    folder = tmp_path / "Tiny-1B-Instruct"
    model = make_model().to(torch.bfloat16)
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, text in {
        "generation_config.json": (folder / "generation_config.json").read_text() + "\n\n",
        "special_tokens_map.json": '{"eos_token":   "<|im_end|>"}',
        "LICENSE": "Anyone may.",
        "README.md": "# Tiny\n\nThe base's own card.",
        "modeling_tiny.py": "raise SystemExit",
        "model.safetensors.index.json": "{}",
        ".hidden": "x",
    }.items():
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def figures(card: str) -> dict[str, list[str]]:
    """The rows of the card's table of what was measured, by name."""
    table = card.partition("## Measured\n\n")[2].partition("\n\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_fit_and_export_leave_the_bases_files_and_a_card_with_the_runs_figures(
    base: Path, run_cli: RunCli, fit_args: list[str], train_file: Path, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard
    from transformers import AutoTokenizer, GenerationConfig

    options = [
        *fit_args[1:],
        f"--model.policy.name={base}",
        "--model.optimizer=AdamW",
        "--model.optimizer.lr=0.0125",
        f"--data.validation={train_file}",
        "--data.grader=contains",
        "--data.columns.reference=reference",
        "--trainer.val_check_interval=1",
        "--trainer.callbacks+=ExportModel",
    ]
    run_cli("fit", *options)
    run_cli("export", *options, "--ckpt_path=last", "--output_dir=out")
    before = contents(base)
    lines = (tmp_path / "runs/a/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured = [each for each in map(json.loads, lines) if each["stage"] == "validation"]
    assert [each["step"] for each in measured][-1] == 2
    for folder in (tmp_path / "runs/a/exported/final", tmp_path / "out"):
        after = contents(folder)
        left = {"modeling_tiny.py", "model.safetensors.index.json", ".hidden"}
        assert after.keys() == before.keys() - left
        same = {name for name in after if after[name] == before[name]}
        assert after.keys() - same == {"model.safetensors", "README.md", "config.json"}
        configs = [json.loads(each["config.json"]) for each in (before, after)]
        assert configs[1].pop("dtype") == "float32"
        assert configs[0].pop("dtype") == "bfloat16"
        assert configs[0] == configs[1]
        assert GenerationConfig.from_pretrained(folder).temperature == 0.7
        assert AutoTokenizer.from_pretrained(folder).chat_template is not None

        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "transformers"
        assert card.data.tags == ["sdft_lightning", "SDFTModule"]
        text = str(card)
        assert "# Tiny-1B-Instruct, trained by SDFTModule" in text
        assert "- Training: 2 optimizer steps, on 12 rows." in text
        assert "except config.json (dtype: bfloat16 is now float32)." in text
        assert "| `model.init_args.optimizer.init_args.lr` | `0.0125` |" in text
        assert "arXiv" in text
        assert str(tmp_path) not in text
        last = {name: value for name, value in measured[-1].items() if name.startswith("val/")}
        shown = figures(text)
        assert {f"val/{name}" for name in shown} == last.keys()
        for name, row in shown.items():
            assert float(row[-1]) == pytest.approx(last[f"val/{name}"], rel=1e-3)


def test_card_of_a_script_without_records_says_that_nothing_was_measured(
    module_options: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    module = SFTModule(**module_options({}))
    card = model_card(module, "merged", origin_of(None), [])
    assert "Nothing was measured." in card
    assert "optimizer steps that nobody has counted" in card
    assert re.search(r"\| `optimizer\.lr` \| `2e-05` \|", card)
    assert "are those of the base, without exception." in card


def test_what_a_script_has_changed_is_written_anew_and_named(
    base: Path, module_options: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = SFTModule(**module_options({"policy": {"name": str(base)}}))
    module.configure_model()
    module.tokenizer.add_tokens(["<new>"])
    module.student.resize_token_embeddings(280)
    module.student.generation_config.temperature = 0.1
    export_model(module, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 280
    assert model.generation_config.temperature == 0.1
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for words in (
        "the files of the tokenizer (as",
        "generation_config.json (changed",
        "config.json (as",
    ):
        assert words in card
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (base / "LICENSE").read_bytes()


def test_base_files_are_neither_weights_nor_code_nor_of_other_programs(base: Path) -> None:
    assert base_files(str(base)).keys() == {
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
