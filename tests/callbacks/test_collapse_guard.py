"""A run that collapses is stopped, its reason given and its best checkpoint kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft_lightning.callbacks import CollapseGuard
from sdft_lightning.callbacks.stops import best_checkpoint, has_finite_weights
from sdft_lightning.data import Columns, DemonstrationDataModule
from sdft_lightning.data.prompts import PromptStyle
from sdft_lightning.errors import UserError
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.models import embedded
from sdft_lightning.modules import SDFTModule
from sdft_lightning.rollout import Sampling
from sdft_lightning.teacher import LiveTeacher

FitModule = Callable[..., Any]
HEALTHY = {
    "loss": 0.9,
    "distinct_2": 0.8,
    "truncated_fraction": 0.4,
    "student_entropy": 1.0,
    "teacher_entropy": 0.9,
}
REPEATING = {**HEALTHY, "distinct_2": 0.01, "truncated_fraction": 0.6}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, dict[str, float]]], Any]:
    """Let the guard read scripted values instead of the step's own."""

    def script(steps: dict[int, dict[str, float]]) -> None:
        def metrics(trainer: L.Trainer) -> dict[str, torch.Tensor]:
            values = steps.get(trainer.global_step, HEALTHY)
            return {f"train/{name}": torch.tensor(value) for name, value in values.items()}

        monkeypatch.setattr(L.Trainer, "callback_metrics", property(metrics))

    return script


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_stops_after_so_many_steps_in_a_row_and_keeps_the_checkpoint_from_before_the_first(
    fit_module: FitModule,
    scripted: Callable[[dict[int, dict[str, float]]], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Steps 3 and 4 recover; the sign lasts from 6 on.
    scripted({step: REPEATING for step in (3, 4, 6, 7, 8, 9)})
    saver = ModelCheckpoint(tmp_path / "checkpoints", "step-{step}", every_n_train_steps=1)
    guard = CollapseGuard(steps=3)
    module = fit_module(
        max_steps=20, max_epochs=-1, enable_checkpointing=True, callbacks=[saver, guard]
    )
    assert module.trainer.global_step == 8
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["kept-step-step=5.ckpt", "step-step=8.ckpt"]
    kept = torch.load(tmp_path / "checkpoints" / names[0], weights_only=True)
    assert kept["global_step"] == 5
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["sign"] == "repetition"
    assert stopped["step"] == 8
    assert stopped["reason"] == (
        "completions repeat themselves: distinct_2 0.01, at the first step 0.8 (3 steps in a row)"
    )
    assert stopped["best_checkpoint"] == str(tmp_path / "checkpoints" / names[0])
    assert records(tmp_path / "metrics.jsonl") == [stopped]
    assert "Stopped at step 8: completions repeat themselves" in caplog.text
    assert "kept-step-step=5.ckpt" in caplog.text


def test_warning_is_given_once_and_the_run_goes_on(
    fit_module: FitModule,
    scripted: Callable[[dict[int, dict[str, float]]], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scripted({step: REPEATING for step in range(2, 7)})
    module = fit_module(max_steps=8, max_epochs=-1, callbacks=[CollapseGuard("warn", steps=2)])
    assert module.trainer.global_step == 8
    assert caplog.text.count("CollapseGuard: Warning at step 3") == 1
    assert caplog.text.count("CollapseGuard: Warning") == 1
    # The teacher is not graded in this fit, so one sign is not there: said once.
    assert caplog.text.count("limits.teacher_lead is never judged") == 1
    assert "none was written before the first sign" in caplog.text
    assert not (tmp_path / "stopped.json").exists()


def test_loss_that_is_no_number_stops_at_once(
    fit_module: FitModule, scripted: Callable[[dict[int, dict[str, float]]], None], tmp_path: Path
) -> None:
    scripted({4: {**HEALTHY, "loss": math.nan}})
    module = fit_module(max_steps=8, max_epochs=-1, callbacks=[CollapseGuard(steps=50)])
    assert module.trainer.global_step == 4
    assert json.loads((tmp_path / "stopped.json").read_text())["sign"] == "loss"


class BreakGradient(L.Callback):
    """Makes one gradient NaN at the third step, whose loss is finite."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 2:
            next(module.student.parameters()).grad.fill_(math.nan)


def test_a_gradient_that_is_no_number_stops_before_its_checkpoint_becomes_the_kept_one(
    fit_module: FitModule, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", "step-{step}", every_n_train_steps=1)
    callbacks = [saver, CollapseGuard(steps=50), BreakGradient()]
    with pytest.raises(UserError, match=r"step 3: .* no checkpoint is written"):
        fit_module(max_steps=6, max_epochs=-1, enable_checkpointing=True, callbacks=callbacks)
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert (stopped["sign"], stopped["step"]) == ("weights", 3)
    kept = Path(stopped["best_checkpoint"])
    assert kept.name == "kept-step-step=2.ckpt"
    assert has_finite_weights(kept)
    assert not kept.with_name("step-step=3.ckpt").exists()


def test_a_better_checkpoint_whose_weights_are_no_numbers_is_passed_over(tmp_path: Path) -> None:
    saver = ModelCheckpoint()
    for name, value in (("best", math.nan), ("last", 1.0)):
        state = {"w": torch.tensor([1.0, value]), "n": torch.tensor(3)}
        torch.save({"state_dict": state}, tmp_path / name)
        setattr(saver, f"{name}_model_path", str(tmp_path / name))
    trainer = SimpleNamespace(checkpoint_callbacks=[saver])
    assert best_checkpoint(trainer) == tmp_path / "last"


def states_of(path: Path, kept: str, tmp_path: Path) -> Any:
    """A guard that was resumed with this name, in a run whose checkpoints are at `path`."""
    guard = CollapseGuard()
    guard.load_state_dict({"first": HEALTHY, "in_a_row": {}, "kept": kept})
    trainer = SimpleNamespace(
        global_step=1,
        checkpoint_callbacks=[ModelCheckpoint(path)],
        is_global_zero=False,
    )
    guard.on_train_start(trainer, SimpleNamespace())  # type: ignore[arg-type]
    return guard, trainer


@pytest.mark.attack
@pytest.mark.parametrize(
    "state", ["{outside}", "../{name}", "{name}", "/{name}", "kept-*", "link/{name}", "..", ""]
)
def test_state_of_a_strangers_checkpoint_deletes_nothing_outside_the_runs_checkpoints(
    state: str, tmp_path: Path
) -> None:
    folder, outside = tmp_path / "run" / "checkpoints", tmp_path / "run" / "kept-a.ckpt"
    folder.mkdir(parents=True)
    outside.write_text("somebody's")
    (folder / "link").symlink_to(tmp_path / "run")
    kept = state.format(outside=outside, name=outside.name)
    guard, trainer = states_of(folder, kept, tmp_path)
    guard._keep_or_release(trainer, suspicious=False)
    assert outside.read_text() == "somebody's"


def test_kept_checkpoint_of_a_resumed_run_is_found_by_its_name_and_released(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    first = CollapseGuard()
    first._kept = folder / "kept-step-3.ckpt"
    first._kept.write_text("a")
    (folder / "step-3.ckpt").write_text("a")
    state = first.state_dict()["kept"]
    assert state == "kept-step-3.ckpt"
    # Older checkpoints hold a whole path, and the run may have been moved since.
    for known in (state, f"/elsewhere/checkpoints/{state}"):
        guard, trainer = states_of(folder, known, tmp_path)
        assert guard._kept == first._kept
    guard._keep_or_release(trainer, suspicious=False)
    assert [path.name for path in folder.iterdir()] == ["step-3.ckpt"]


def test_best_checkpoint_of_another_run_is_not_given_a_second_name(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "run" / "checkpoints")
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "other.ckpt")
    saver.best_model_path = str(tmp_path / "other.ckpt")
    assert best_checkpoint(SimpleNamespace(checkpoint_callbacks=[saver])) is None


def test_every_micro_batchs_loss_counts_and_the_head_is_not_asked_for(
    fit_module: FitModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step, asked = SDFTModule.training_step, []
    head = SDFTModule.gather_head

    def broken(module: Any, batch: Any, batch_idx: int) -> Any:
        outputs = step(module, batch, batch_idx)
        if batch_idx == 2:  # the first of the second window; what is logged is finite
            outputs["loss"] = outputs["loss"] * math.nan
        return outputs

    def counted(module: Any) -> Any:
        asked.append(module)
        return head(module)

    monkeypatch.setattr(SDFTModule, "training_step", broken)
    monkeypatch.setattr(SDFTModule, "gather_head", counted)
    guard = CollapseGuard(steps=50)
    fit_module(max_steps=3, max_epochs=-1, accumulate_grad_batches=2, callbacks=[guard])
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert (stopped["sign"], stopped["step"]) == ("loss", 2)
    assert len(asked) == 4  # once a micro-batch: under fsdp2 each gathers the whole head


def test_count_goes_on_in_a_resumed_run(
    fit_module: FitModule, scripted: Callable[[dict[int, dict[str, float]]], None]
) -> None:
    scripted({step: REPEATING for step in range(2, 9)})
    first = CollapseGuard(steps=4)
    fit_module(max_steps=3, max_epochs=-1, callbacks=[first])
    state = json.loads(json.dumps(first.state_dict()))
    assert state["in_a_row"]["repetition"] == 2
    second = CollapseGuard(steps=4)
    second.load_state_dict(state)
    # Starts at step 1 again, which is healthy and would reset the count: so no script for it.
    scripted({step: REPEATING for step in range(1, 9)})
    module = fit_module(max_steps=8, max_epochs=-1, callbacks=[second])
    assert module.trainer.global_step == 2


def test_teacher_that_no_longer_beats_its_student_stops_after_two_validations(
    fit_module: FitModule, train_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A random model answers nothing: teacher and student have 0 of 12.
    module = fit_module(
        model={"evaluation": {"teacher_in_fit": True}},
        data={"validation": str(train_file), "grader": "exact"},
        callbacks=[CollapseGuard()],
        max_steps=12,
        max_epochs=-1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    assert module.trainer.global_step == 6
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["sign"] == "teacher_no_better"
    assert "teacher_accuracy 0, accuracy 0" in stopped["reason"]
    assert "(2 validations in a row)" in stopped["reason"]
    assert "never judged" not in caplog.text


def test_counts_are_logged_and_options_come_from_the_fragment(
    run_cli: Callable[..., None], fit_args: list[str], tmp_path: Path
) -> None:
    fragment = Path(__file__).parents[2] / "configs" / "callbacks" / "collapse_guard.yaml"
    run_cli(
        *fit_args,
        f"--config={fragment}",
        "--trainer.log_every_n_steps=1",
        "--trainer.max_steps=3",
    )
    (config,) = (tmp_path / "runs" / "a").glob("config.yaml")
    assert "CollapseGuard" in config.read_text()
    lines = records(tmp_path / "runs" / "a" / "metrics.jsonl")
    assert [line["guard/repetition"] for line in lines] == [0.0, 0.0, 0.0]
    assert {name for name in lines[0] if name.startswith("guard/")} == {
        f"guard/{sign}"
        for sign in (
            *("loss", "weights", "repetition", "truncation"),
            *("entropy", "student_uniform", "teacher_uniform"),
        )
    }


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"CollapseGuard\.steps: got 0, allowed are 1 and more"):
        CollapseGuard(steps=0)


# The paper's ablation: nothing holds a live teacher where it was, and reverse KL pulls both to one
# certain word. A frozen teacher does not collapse so soon (30 steps at the same rate did not).
COLLAPSING = {"divergence": Divergence("reverse_kl"), "teacher": LiveTeacher()}


@pytest.mark.slow
@pytest.mark.timeout(900)  # nine steps; more than the usual limit on a busy machine
@pytest.mark.embedded
@pytest.mark.skipif(
    not embedded.is_prepared(), reason="the embedded model is not in the cache: `make model`"
)
def test_embedded_model_made_to_collapse_is_stopped_within_30_steps_and_the_cause_named(
    tmp_path: Path,
) -> None:
    L.seed_everything(42, verbose=False)
    module = SDFTModule(
        sampling=Sampling(max_new_tokens=16),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
        **COLLAPSING,
    )
    rows = DemonstrationDataModule(
        train="example:front_desk/train.jsonl",
        prompts=PromptStyle("context"),
        columns=Columns(context="context", id="id"),
        batch_size=4,
    )
    trainer = L.Trainer(
        max_steps=30,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[CollapseGuard()],
    )
    trainer.fit(module, rows)
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["step"] == trainer.global_step < 30
    assert stopped["sign"] in ("repetition", "entropy")
    assert "at the first step" in stopped["reason"]
