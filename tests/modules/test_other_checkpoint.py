"""A checkpoint of another teacher or optimizer, or of weights only; what needs no teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from sdft_lightning.data import Columns, DemonstrationDataModule
from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy
from sdft_lightning.modules import SDFTModule
from sdft_lightning.modules.evaluation import Evaluation
from sdft_lightning.rollout import Sampling

RunCli = Callable[..., None]
FROZEN = "--model.teacher=FrozenTeacher"
LIVE = "--model.teacher=LiveTeacher"


@pytest.fixture
def command(fit_args: list[str], train_file: Path) -> Callable[..., list[str]]:
    """A command of the run `a` on its last checkpoint, with graded questions where wanted."""

    def args(name: str, *more: str, grader: str | None = "contains") -> list[str]:
        given = [name, *fit_args[1:], "--ckpt_path=last", "--data.columns.reference=reference"]
        given += [f"--data.grader={grader}"] if grader and name != "predict" else []
        data = {"validate": "validation", "test": "test", "predict": "predict"}.get(name)
        given += [f"--data.{data}={train_file}"] if data else []
        return [*given, *more]

    return args


@pytest.fixture
def refused(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """The one sentence that a command ends with, without having loaded a model."""

    def run(args: list[str]) -> str:
        with monkeypatch.context() as patch:
            patch.setattr("sdft_lightning.modules.base.load_policy", pytest.fail)
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                run_cli(*args)
        message = capsys.readouterr().err
        assert stop.value.code == 2
        assert message.count("error: ") == 1
        assert "Traceback" not in message
        return message.partition("error: ")[2]

    return run


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_fit_of_another_teacher_is_refused_before_the_model_is_loaded(
    run_cli: RunCli, fit_args: list[str], command: Any, refused: Any, tmp_path: Path
) -> None:
    run_cli(*fit_args)
    before = files(tmp_path / "runs")
    message = refused(command("fit", FROZEN))
    assert message.startswith("model.teacher: the checkpoint was written with EMATeacher, and this")
    assert "FrozenTeacher. Give --model.teacher=EMATeacher" in message
    assert files(tmp_path / "runs") == before


@pytest.mark.parametrize("name", ["validate", "test"])
def test_teacher_that_will_be_graded_must_be_the_checkpoints(
    name: str, run_cli: RunCli, fit_args: list[str], command: Any, refused: Any, tmp_path: Path
) -> None:
    run_cli(*fit_args, LIVE)
    assert "Give --model.teacher=LiveTeacher" in refused(command(name))
    run_cli(*command(name, LIVE))
    found = (tmp_path / "runs" / "a" / f"{name}-0" / "metrics.jsonl").read_text()
    stage = {"validate": "val", "test": "test"}[name]
    assert f"{stage}/task/task/teacher_accuracy" in json.loads(found.splitlines()[-1])


@pytest.mark.parametrize("written_with", [LIVE, FROZEN])
@pytest.mark.parametrize("name", ["validate", "test", "predict", "export"])
def test_commands_need_no_teacher_that_they_do_not_use(
    name: str,
    written_with: str,
    run_cli: RunCli,
    fit_args: list[str],
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_cli(*fit_args, written_with)
    monkeypatch.setattr(SDFTModule, "load_teacher", pytest.fail)
    run_cli(*command(name, grader=None))


def test_held_out_questions_alone_need_no_teacher(
    run_cli: RunCli, fit_args: list[str], command: Any, train_file: Path
) -> None:
    run_cli(*fit_args, LIVE)
    held_out = json.dumps({"general": {"source": str(train_file), "grader": "contains"}})
    args = command("validate", f"--data.held_out={held_out}")
    run_cli(*(arg for arg in args if not arg.startswith("--data.validation")))


def test_fit_of_another_optimizer_is_refused_before_the_model_is_loaded(
    run_cli: RunCli, fit_args: list[str], command: Any, refused: Any
) -> None:
    run_cli(*fit_args)
    sgd = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.01"]
    message = refused(command("fit", *sgd))
    assert message.startswith("model.optimizer: the checkpoint was written with AdamW, and this")
    assert "has SGD. Give --model.optimizer=AdamW" in message
    run_cli(*command("validate", *sgd))  # which trains nothing


def test_weights_alone_are_no_place_to_go_on_from(
    run_cli: RunCli, fit_args: list[str], command: Any, refused: Any
) -> None:
    run_cli(*fit_args, "--checkpoint.save_weights_only=true")
    message = refused(command("fit"))
    assert message.startswith("ckpt_path: the checkpoint holds weights only")
    assert "--model.policy.name" in message
    run_cli(*command("validate"))


@pytest.mark.parametrize("key", ["state_dict", "pytorch-lightning_version", "loops"])
def test_checkpoint_without_a_part_is_refused(
    key: str, run_cli: RunCli, fit_args: list[str], command: Any, refused: Any, tmp_path: Path
) -> None:
    run_cli(*fit_args)
    path = tmp_path / "runs/a/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    del content[key]
    torch.save(content, path)
    words = f"{path} is no checkpoint of a run: it has no {key}"
    assert words in refused([*command("fit"), f"--ckpt_path={path}"])


@pytest.mark.parametrize("name", ["fit", "validate", "export"])
def test_weights_of_another_shape_are_refused_and_named(
    name: str, run_cli: RunCli, fit_args: list[str], command: Any, tmp_path: Path, capsys: Any
) -> None:
    run_cli(*fit_args)
    path = tmp_path / "runs/a/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    weights, norm = content["state_dict"], "student.model.norm.weight"
    weights[norm] = weights[norm][:-1]
    torch.save(content, path)
    with pytest.raises(SystemExit) as stop:
        run_cli(*command(name))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"e.g. {norm}: (31,) in the checkpoint, (32,) in the model" in message


class Script:
    """Fits without the command line."""

    def __init__(self, model_folder: Path, train_file: Path, tmp_path: Path) -> None:
        self.model, self.rows, self.path = str(model_folder), str(train_file), tmp_path

    def module(self, **options: Any) -> SDFTModule:
        sampling = Sampling(max_new_tokens=4)
        return SDFTModule(
            policy=Policy(self.model), sampling=sampling, evaluation=Evaluation(4), **options
        )

    def data(self) -> DemonstrationDataModule:
        return DemonstrationDataModule(
            train=self.rows,
            predict=self.rows,
            prompts=PromptStyle("turns"),
            columns=Columns(reference="reference"),
            batch_size=2,
        )

    def trainer(self, steps: int = 1) -> L.Trainer:
        return L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.path,
        )


@pytest.fixture
def script(model_folder: Path, train_file: Path, tmp_path: Path) -> Script:
    """Makes modules, data and trainers."""
    return Script(model_folder, train_file, tmp_path)


def by_shape(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Matrices and vectors in groups of their own, of which one may be empty."""
    given = list(parameters)
    groups = [[each for each in given if (each.ndim > 1) is flat] for flat in (True, False)]
    return torch.optim.AdamW([{"params": group} for group in groups if group], lr=0.01)


def test_other_parameter_groups_are_refused_and_the_same_ones_are_not(script: Script) -> None:
    trainer, module = script.trainer(), script.module(optimizer=by_shape)
    trainer.fit(module, script.data())
    path = script.path / "a.ckpt"
    trainer.save_checkpoint(path)
    script.trainer(2).fit(script.module(optimizer=by_shape), script.data(), ckpt_path=path)
    with pytest.raises(UserError, match=r"model\.optimizer: .* groups of \[15, 5\].* has \[20\]"):
        script.trainer(2).fit(script.module(), script.data(), ckpt_path=path)


def test_module_that_has_predicted_without_a_teacher_gets_one_for_a_fit(script: Script) -> None:
    module, data = script.module(), script.data()
    script.trainer().predict(module, data)
    assert not module.teacher.is_loaded
    script.trainer().fit(module, data)
    assert module.teacher.is_loaded
