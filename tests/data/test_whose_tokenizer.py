"""Rows are tokenized for the model that is trained, and for no other one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from sdft_lightning.data import Columns, DemonstrationDataModule
from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy
from sdft_lightning.modules import SDFTModule, SFTModule
from sdft_lightning.modules.evaluation import Evaluation
from sdft_lightning.rollout import Sampling

FitModule = Callable[..., Any]


class Prompts(L.Callback):
    """Keeps the text of the first prompt of a fit."""

    text = ""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        row = batch.prompt_ids[0][batch.prompt_mask[0]]
        self.text = self.text or module.tokenizer.decode(row)


@pytest.fixture
def other_folder(model: Any, make_tokenizer: Callable[..., Any], tmp_path: Path) -> Path:
    """A model whose chat template writes questions in another way."""
    folder = tmp_path / "other"
    model.save_pretrained(folder)
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    make_tokenizer(template).save_pretrained(folder)
    return folder


def trainer(tmp_path: Path, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
    )


def sdft(folder: Path) -> SDFTModule:
    return SDFTModule(
        policy=Policy(str(folder)), sampling=Sampling(max_new_tokens=4), evaluation=Evaluation(4)
    )


def rows(train_file: Path, **options: Any) -> DemonstrationDataModule:
    style = PromptStyle("turns")
    return DemonstrationDataModule(train=str(train_file), prompts=style, batch_size=2, **options)


def test_data_module_without_a_model_takes_that_of_the_module(
    other_folder: Path, train_file: Path, tmp_path: Path
) -> None:
    prompts = Prompts()
    trainer(tmp_path, prompts).fit(sdft(other_folder), rows(train_file))
    assert prompts.text.startswith("[user] Q")


def test_data_module_of_a_second_fit_tokenizes_anew_for_another_model(
    model_folder: Path, other_folder: Path, train_file: Path, tmp_path: Path
) -> None:
    data, first, second = rows(train_file), Prompts(), Prompts()
    trainer(tmp_path, first).fit(sdft(model_folder), data)
    trainer(tmp_path, second).fit(sdft(other_folder), data)
    assert first.text.startswith("<|im_start|>user")
    assert second.text.startswith("[user] Q")


def test_data_module_of_a_second_fit_reads_what_another_method_needs(
    model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    from sdft_lightning.modules import CPTModule

    path = write_rows([{"context": f"Text {i}."} for i in range(4)])
    data = rows(path, columns=Columns(context="context"))
    trainer(tmp_path).fit(CPTModule(policy=Policy(str(model_folder))), data)
    with pytest.raises(UserError, match=r"data\.columns\.prompt"):
        trainer(tmp_path).fit(SFTModule(policy=Policy(str(model_folder))), data)


def test_data_module_of_another_model_is_refused_and_both_are_named(
    fit_module: FitModule, model_folder: Path, other_folder: Path
) -> None:
    with pytest.raises(UserError) as refused:
        fit_module(
            model={"policy": {"name": str(other_folder)}}, data={"model_name": str(model_folder)}
        )
    assert f"data module has {model_folder}" in str(refused.value)
    assert f"module that is trained has {other_folder}" in str(refused.value)


def test_data_module_of_another_revision_is_refused_and_both_are_named(
    fit_module: FitModule, model_folder: Path
) -> None:
    with pytest.raises(UserError, match=f"has {model_folder} at revision main, and .* has "):
        fit_module(data={"revision": "main"})


@pytest.mark.parametrize("named_in_data", [True, False])
def test_revision_of_the_module_is_the_data_modules_too(
    named_in_data: bool, model_folder: Path, train_file: Path, tmp_path: Path
) -> None:
    data = rows(train_file, model_name=str(model_folder) if named_in_data else None)
    seen: list[Any] = []

    class Look(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(data.model_version)

    module = sdft(model_folder)
    # Of a folder, transformers ignores the revision.
    module.policy = Policy(str(model_folder), revision="v1")
    trainer(tmp_path, Look()).fit(module, data)
    assert seen == [(str(model_folder), "v1")]


def test_same_folder_by_another_path_is_the_same_model(
    fit_module: FitModule, model_folder: Path
) -> None:
    fit_module(data={"model_name": os.path.relpath(model_folder)})


def test_data_module_alone_asks_for_a_model(train_file: Path) -> None:
    with pytest.raises(UserError, match=r"data\.model_name: not given, and there is no module"):
        rows(train_file).setup("fit")
