"""Folders that are no model that can be trained here end in one sentence, whoever reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import XLNetConfig

from sdft_lightning.cli import main
from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.tokenization import (
    load_config,
    load_max_length,
    load_stop_ids,
    load_tokenizer,
)

Spoil = Callable[[Path], object]


def change(name: str = "config.json", **values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **values}))

    return spoil


def write(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


def only(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder / name).write_text("{}")

    return spoil


def cut(start: int | None, end: int | None) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[start:end])

    return spoil


CODE = {"AutoModelForCausalLM": "modeling.Model"}
FOLDERS: dict[str, tuple[Spoil, str]] = {
    "sizes": (change(intermediate_size=48), r"other sizes.*\.mlp\..*instead of"),
    "vocabulary": (change(vocab_size=300), "other sizes.*embed_tokens"),
    "unknown type": (change(model_type="llama9"), "'llama9', which this version of transformers"),
    "no type": (change(model_type=None), "names no model_type"),
    "own code": (change(model_type="own", auto_map=CODE), "own code"),
    "odd auto_map": (change(auto_map=7), "no config could be loaded"),
    "truncated": (cut(0, -900), "no model could be loaded"),
    "cut in the header": (cut(0, 100), "no model could be loaded"),
    "no bytes": (cut(0, 0), "no model could be loaded"),
    "empty config": (write("config.json", ""), "config.json is no JSON file"),
    "half a config": (write("config.json", "{"), "config.json is no JSON file"),
    "a list": (write("config.json", "[]"), "holds a list"),
    "deep": (write("config.json", "[" * 100_000), "config.json is no JSON file"),
    "no tokens": (write("tokenizer.json", "{}"), "no tokenizer could be loaded"),
    "half a tokenizer": (write("tokenizer.json", "{"), "no tokenizer could be loaded"),
    "tokenizer list": (write("tokenizer_config.json", "[]"), "no tokenizer could be loaded"),
    "encoder": (change(model_type="vit"), "of the type vit, which is no causal"),
    "encoder and decoder": (change(model_type="t5"), "of the type t5, which is no causal"),
    "diffusers": (only("model_index.json"), "a pipeline of diffusers"),
    "adapter": (only("adapter_config.json"), "an adapter of peft"),
    "attention": (change(attn_implementation="someone/kernel"), "'someone/kernel' names a repo"),
    "attention of a part": (
        change(attn_implementation={"text_config": "someone/kernel"}),
        "'someone/kernel' names a repo",
    ),
    "stop text": (change(eos_token_id="2"), "eos_token_id is '2'"),
    "stop list": (change(eos_token_id=[[2]]), "eos_token_id is"),
    "stop below 0": (change("generation_config.json", eos_token_id=-1), "eos_token_id is -1"),
    "stop bool": (change("generation_config.json", eos_token_id=True), "eos_token_id is True"),
    "generation": (write("generation_config.json", "{"), "generation_config.json is no JSON"),
    "no heads": (change(num_attention_heads=0), "no config could be loaded"),
    "layers below 0": (change(num_hidden_layers=-1), "num_hidden_layers of .* is -1; allowed"),
    "no layers": (change(num_hidden_layers=0), "num_hidden_layers of .* is 0; allowed"),
    "layers without end": (change(num_hidden_layers=10**12), "allowed are 1 to 10000"),
    "width below 0": (change(hidden_size=-32), "hidden_size of .* is -32; allowed are 1 to"),
    "width of terabytes": (change(hidden_size=10**9), "hidden_size of .* is 1000000000"),
    "no tokens in it": (change(vocab_size=0), "vocab_size of .* is 0; allowed"),
    "no positions": (change(max_position_embeddings=-1), "max_position_embeddings of .* is -1"),
    "a part that is none": (change(text_config=7), "text_config of .* is 7"),
    "length of no number": (
        change("tokenizer_config.json", model_max_length="x"),
        "model_max_length of the tokenizer of .* is 'x'",
    ),
    "activation": (change(hidden_act="nothing"), "no model could be loaded"),
}


@pytest.mark.attack
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_no_model_is_one_sentence(
    name: str, model_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    spoil, said = FOLDERS[name]
    spoil(folder)
    with pytest.raises(UserError, match=f"(?s){said}") as found:
        load_policy(Policy(str(folder)))
    assert len(str(found.value)) < 800
    # Other readers of the folder take it or refuse it, and never fail in another way.
    readers: list[Callable[[], Any]] = [
        lambda: load_tokenizer(str(folder)),
        lambda: load_config(str(folder)),
        lambda: load_stop_ids(str(folder), tokenizer),
        lambda: load_max_length(str(folder), tokenizer),
    ]
    for read in readers:
        try:
            read()
        except UserError:
            continue


@pytest.mark.parametrize("name", ["sizes", "own code", "half a config", "adapter", "attention"])
def test_the_command_ends_with_the_sentence_and_leaves_the_runs_name_free(
    name: str,
    model_folder: Path,
    tmp_path: Path,
    fit_args: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    spoil, said = FOLDERS[name]
    spoil(folder)
    with pytest.raises(SystemExit) as ended:
        main([*fit_args, f"--model.policy.name={folder}"])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert said.split(".*")[0].replace("\\", "") in shown


def test_a_rate_of_dropout_that_is_a_whole_number_is_turned_off_as_any_other(
    model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    change(attention_dropout=1)(folder)
    layer = load_policy(Policy(str(folder))).model.model.layers[0]
    assert layer.self_attn.attention_dropout == 0


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody9/model"])
def test_a_name_that_no_file_system_takes_is_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.policy\.name"):
        load_tokenizer(name)


@pytest.mark.attack
def test_an_option_that_names_attention_on_the_hub_is_refused_before_anything_is_loaded(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", pytest.fail)
    with pytest.raises(
        UserError, match=r"model.policy.attn_implementation.*'a/b' names a repository"
    ):
        load_policy(Policy(str(model_folder), attn_implementation="a/b"))


def test_a_token_without_an_embedding_is_refused_only_where_it_occurs(
    make_model_folder: Callable[..., Path],
    fit_module: Callable[..., Any],
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
    tokenizer: Any,
) -> None:
    folder = make_model_folder("short", vocab_size=len(tokenizer) - 1)
    options = {"model": {"policy": {"name": str(folder)}}, "data": {"model_name": str(folder)}}
    fit_module(**options)
    rows = make_rows(4)
    texts = [tokenizer(chr(code)).input_ids for code in range(128, 700)]
    found = next(128 + i for i, ids in enumerate(texts) if max(ids) == len(tokenizer) - 1)
    rows[2]["prompt"] = f"What is {chr(found)}?"
    options["data"]["train"] = str(write_rows(rows, "odd.jsonl"))
    with pytest.raises(UserError, match=rf"odd.jsonl.*3.* id {len(tokenizer) - 1}, .*only"):
        fit_module(**options)


def test_a_model_without_a_limit_of_length_is_read(tmp_path: Path, tokenizer: Any) -> None:
    XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).max_position_embeddings == -1  # XLNet's word for it
    assert load_max_length(str(tmp_path), tokenizer) == 2048  # as the harness, where none is known
