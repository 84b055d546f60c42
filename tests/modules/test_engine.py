"""Training with another engine, its correction and its alarm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.modules import SDFTModule
from sdft_lightning.rollout import (
    Engine,
    RolloutRequest,
    Sampling,
    StudentPasses,
    TransformersEngine,
    VLLMEngine,
)
from sdft_lightning.rollout.mismatch import Mismatch
from sdft_lightning.types import Rollout


class OtherEngine(Engine):
    """Samples as the trainer does, but is no part of it: with a shift of its log-probabilities."""

    truncates_log_probs: ClassVar[bool] = False

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift
        self.steps: list[int] = []
        self.forgotten = self.closed = 0

    def generate(self, student: StudentPasses, request: RolloutRequest) -> Rollout:
        self.steps.append(request.step)
        rollout = TransformersEngine().generate(self.passes(student), request)
        return rollout._replace(sampled_log_probs=rollout.sampled_log_probs - self.shift)

    def passes(self, student: StudentPasses) -> StudentPasses:
        return student

    def forget(self) -> None:
        self.forgotten += 1

    def close(self) -> None:
        self.closed += 1


class StaleEngine(OtherEngine):
    """Samples for ever with the weights that it saw first."""

    def passes(self, student: StudentPasses) -> StudentPasses:
        if not hasattr(self, "first"):
            self.first = StudentPasses("same").at(copy.deepcopy(student.model), 0)
        return self.first


class Recorder(L.Callback):
    """Keeps what each step logged, and its loss."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.logged.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def fit(fit_module: Any, steps: int = 1, lr: float = 0.0, **model: Any) -> list[dict[str, float]]:
    recorder = Recorder()
    options = {
        "sampling": Sampling(8, completions_per_prompt=2),
        "optimizer": lambda p: torch.optim.SGD(p, lr=lr),
        **model,
    }
    fit_module(model=options, callbacks=[recorder], max_steps=steps)
    return recorder.logged


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_engine_with_the_same_weights_has_ratio_one_and_the_uncorrected_loss(
    kind: Any, fit_module: Any
) -> None:
    (plain,) = fit(fit_module)
    (found,) = fit(fit_module, engine=OtherEngine(), mismatch=Mismatch(kind))
    assert "train/sampler/ratio" not in plain
    assert found["train/sampler/ratio"] == pytest.approx(1, abs=1e-5)
    assert found["train/sampler/log_prob_difference"] < 1e-5
    assert found["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "shift", "factor"),
    [
        ("none", 0.5, 1.0),
        ("token", 0.5, 2.718281828**0.5),
        ("sequence", 0.5, 2.718281828**0.5),
        ("token", 1.0, 2.0),  # e is capped
        ("sequence", -1.0, 2.718281828**-1),
    ],
)
def test_loss_is_weighed_by_the_capped_ratio(
    kind: Any, shift: float, factor: float, fit_module: Any
) -> None:
    (plain,) = fit(fit_module)
    correction = Mismatch(kind, cap=2.0)
    (found,) = fit(fit_module, engine=OtherEngine(shift), mismatch=correction)
    assert found["train/loss"] == pytest.approx(factor * plain["train/loss"], rel=1e-4)
    assert found["train/sampler/log_prob_difference"] == pytest.approx(abs(shift), rel=1e-4)
    # What is logged about the divergence itself is not weighed.
    assert found["train/kl"] == pytest.approx(plain["train/kl"], rel=1e-5)


def test_stale_weights_are_seen_by_the_alarm(
    fit_module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = fit(fit_module, 3, lr=0.5, engine=OtherEngine())
    assert "model.mismatch" not in caplog.text
    stale = fit(fit_module, 3, lr=0.5, engine=StaleEngine())
    name = "train/sampler/log_prob_difference"
    assert max(values[name] for values in fresh) < 1e-4
    assert stale[0][name] < 1e-4
    assert stale[2][name] > 0.1
    assert caplog.text.count("more than warn_above = 0.1") == 1


def test_stop_above_ends_the_run(fit_module: Any) -> None:
    with pytest.raises(UserError, match=r"stop_above is 0\.2"):
        fit(fit_module, 2, engine=OtherEngine(0.3), mismatch=Mismatch(stop_above=0.2))


def test_engine_is_asked_once_an_optimizer_step_told_of_foreign_weights_and_closed(
    fit_module: Any,
) -> None:
    engine = OtherEngine()
    fit_module(
        model={"sampling": Sampling(4), "engine": engine},
        max_steps=2,
        accumulate_grad_batches=3,
    )
    assert engine.steps == [0, 1]
    assert engine.forgotten >= 1  # fit may begin with weights from a checkpoint
    assert engine.closed == 1


def test_correction_applies_to_the_trainers_own_bfloat16_copy(fit_module: Any) -> None:
    correction = Mismatch("token")
    (found,) = fit(fit_module, policy={"sampling_dtype": "bfloat16"}, mismatch=correction)
    assert 1e-4 < found["train/sampler/log_prob_difference"] < 0.1


@pytest.mark.parametrize("options", [{"engine": OtherEngine()}, {"mismatch": Mismatch("token")}])
def test_teacher_does_not_sample_with_another_engine(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="generate_from_teacher"):
        SDFTModule(generate_from_teacher=True, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sampling": Sampling(top_k=5, top_p=0.9)}, "top_k and top_p"),
        ({}, r"pip install -e '\.\[vllm\]'"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_a_model_is_loaded(
    options: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    module = SDFTModule(engine=VLLMEngine(), **options)
    with pytest.raises(UserError, match=text):
        module.check_before_fit([])
    assert module.student is None


def test_engine_is_chosen_in_the_config(
    run_cli: Callable[..., None], model_folder: Path, train_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(
            "fit",
            "--model=SDFTModule",
            f"--model.policy.name={model_folder}",
            f"--data.train={train_file}",
            "--data.prompts.style=turns",
            "--model.engine=VLLMServerEngine",
            "--model.engine.base_url=http://127.0.0.1:9",  # nobody listens there
            "--model.engine.patience_seconds=0",
            "--model.mismatch.correction=sequence",
            "--model.sampling.max_new_tokens=4",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=1",
        )
    assert stop.value.code == 2
