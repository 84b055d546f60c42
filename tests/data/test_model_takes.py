"""Rows that have no room in the model with what is written behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config

from sdft_lightning.data.tokenize import check_model_takes
from sdft_lightning.data.tokens import TokenizedRow
from sdft_lightning.errors import UserError
from sdft_lightning.models.tokenization import has_rotary_positions
from sdft_lightning.types import Demonstration

BY = "model.sampling.max_new_tokens"


def tokens(prompt: int, teacher_prompt: int, demonstration: int = 5) -> TokenizedRow:
    row = Demonstration("r", [], [], None, None, f"rows.jsonl, prompt of {prompt}")
    return TokenizedRow(row, [1] * prompt, [1] * teacher_prompt, [1] * demonstration, [])


def test_longest_sequence_that_fits_is_nothing_to_tell() -> None:
    assert check_model_takes([tokens(20, 60)], 64, 4, BY, False) is None
    assert check_model_takes([tokens(60, 90)], 65, 0, BY, False) is None  # nobody reads the 90


@pytest.mark.parametrize("longer_works", [True, False])
def test_prompt_that_fills_the_model_is_refused(longer_works: bool) -> None:
    with pytest.raises(UserError, match="prompt of 30: a prompt of 64 tokens and up to 4 new"):
        check_model_takes([tokens(9, 9), tokens(30, 64)], 64, 4, BY, longer_works)


@pytest.mark.parametrize("longer_works", [True, False])
def test_demonstration_that_does_not_fit_is_refused(longer_works: bool) -> None:
    with pytest.raises(UserError, match="65 tokens do not fit into the model, which takes 64"):
        check_model_takes([tokens(60, 90)], 64, 0, BY, longer_works)


def test_samples_that_may_become_too_long_are_told_where_the_model_computes_them() -> None:
    rows = [tokens(9, 9), tokens(20, 61)]
    warning = check_model_takes(rows, 64, 4, BY, True)
    assert warning is not None
    assert "up to 4 new ones (model.sampling.max_new_tokens)" in warning
    assert "1 of 2 rows do not" in warning
    with pytest.raises(UserError, match="which takes 64"):
        check_model_takes(rows, 64, 4, BY, False)


def test_models_with_a_table_of_positions_are_told_from_the_others(
    model_folder: Path, tmp_path: Path
) -> None:
    assert has_rotary_positions(str(model_folder))
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert not has_rotary_positions(str(tmp_path / "gpt2"))


@pytest.mark.parametrize("option", ["sampling.max_new_tokens", "evaluation.max_new_tokens"])
def test_run_with_long_samples_is_told_and_goes_on(
    run_cli: Callable[..., None],
    fit_args: list[str],
    train_file: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    run_cli(
        *fit_args,
        f"--data.validation={train_file}",
        f"--model.{option}=505",
        "--trainer.max_steps=0",
    )
    told = f"up to 505 new ones (model.{option}) do not fit into the model, which takes 512"
    assert told in capsys.readouterr().err
