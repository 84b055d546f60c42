"""Options that have another name now: the old one is refused with the new one's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdft_lightning.errors import RENAMED, UserError
from sdft_lightning.modules import ReinvokeModule, SDFTModule, SFTModule


def test_old_argument_of_a_module_names_the_new_one() -> None:
    with pytest.raises(UserError, match=r"SFTModule: model\.model_name is model\.policy\.name now"):
        SFTModule(model_name="embedded")
    told = r"model\.lora is model\.policy\.lora now\. model\.sampler_alarm is model\.mismatch now"
    with pytest.raises(UserError, match=told):
        SDFTModule(lora=None, sampler_alarm=None)


def test_argument_that_never_was_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match=r"SFTModule\(\) got an unexpected .*'temperature'"):
        SFTModule(temperature=1.0)
    with pytest.raises(TypeError, match="positional"):
        SDFTModule("embedded")  # type: ignore[misc]


@pytest.mark.parametrize("old", RENAMED)
def test_every_new_name_is_an_option_of_a_module(old: str) -> None:
    parser = pytest.importorskip("jsonargparse").ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ReinvokeModule, "model")
    assert f"model.{RENAMED[old]}" in parser.get_defaults() or RENAMED[old] == "mismatch"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--model.model_name=x"], "model.model_name is model.policy.name now"),
        (["--model.lora.r=8"], "model.lora.r is model.policy.lora.r now"),
        (["--model.init_args.eval_max_new_tokens=8"], "model.evaluation.max_new_tokens now"),
        (["--model.mismatch_correction.kind=token"], "is model.mismatch.correction now"),
    ],
)
def test_old_option_of_the_command_line_names_the_new_one(
    given: list[str],
    told: str,
    run_cli: Callable[..., Any],
    fit_args: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(*fit_args, *given)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_old_option_of_a_config_names_the_new_one(
    run_cli: Callable[..., Any],
    fit_args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "old.yaml"
    config.write_text("model:\n  class_path: SFTModule\n  init_args:\n    model_name: embedded\n")
    with pytest.raises(SystemExit) as stop:
        run_cli("fit", f"--config={config}", f"--run.root={tmp_path / 'runs'}")
    assert stop.value.code == 2
    assert "model.model_name is model.policy.name now" in capsys.readouterr().err
