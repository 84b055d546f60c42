"""What is logged of an optimizer step, and its gradients, are those of its whole window."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.callbacks import CollapseGuard
from sdft_lightning.errors import UserError
from sdft_lightning.modules import (
    CPTModule,
    DFTModule,
    OfflineDistillationModule,
    SDFTModule,
    SFTKLModule,
    SFTModule,
)
from sdft_lightning.modules.window import StepValues
from sdft_lightning.rollout import (
    Engine,
    RolloutRequest,
    Sampling,
    StudentPasses,
    TransformersEngine,
)
from sdft_lightning.rollout.mismatch import Mismatch
from sdft_lightning.types import Rollout, TokenStatistics

FitModule = Callable[..., Any]
# Twelve rows in micro-batches of two: a window of four, and one of two.
WINDOWS = {"accumulate_grad_batches": 4, "max_steps": 2}


class Seen(SDFTModule):
    """Keeps the tokens and completions of each micro-batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[Tensor, Rollout, Tensor, TokenStatistics]] = []

    def load_models(self) -> None:
        super().load_models()
        self.stop_ids = list(range(0, 272, 16))  # so that completions are of unequal lengths

    def log_step(
        self, loss: Tensor, tokens: TokenStatistics, rollout: Rollout, keep: Tensor
    ) -> None:
        self.seen.append((loss.detach(), rollout, keep, tokens))
        super().log_step(loss, tokens, rollout, keep)


class Logged(L.Callback):
    """Keeps what is logged at each micro-batch, and the gradients of each step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        parameters = [each for each in module.student.parameters() if each.grad is not None]
        self.gradients.append(torch.cat([each.grad.double().flatten() for each in parameters]))

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.metrics.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def expected(seen: list[tuple[Tensor, Rollout, Tensor, TokenStatistics]]) -> dict[str, float]:
    """What the micro-batches of a window come to, row by row."""
    found: dict[str, list[float]] = {}
    pairs: list[tuple[int, int]] = []
    for loss, rollout, keep, tokens in seen:
        found.setdefault("loss", []).append(float(loss))
        found.setdefault("truncated_fraction", []).extend(rollout.truncated.float().tolist())
        for row in range(len(keep)):
            ids = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
            found.setdefault("completion_length", []).append(len(ids))
            pairs.extend(pairwise(ids))
        lengths = keep.sum(dim=1).tolist()
        for name in ("kl", "student_entropy", "teacher_entropy", "top1_agreement"):
            parts = getattr(tokens, name).split(lengths)
            found.setdefault(name, []).extend(float(p.mean()) for p in parts if len(p))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return {**means, "distinct_2": len(set(pairs)) / len(pairs)}


def test_every_value_is_that_of_the_whole_window(fit_module: FitModule) -> None:
    logged, guard = Logged(), CollapseGuard()
    module = fit_module(
        Seen,
        model={"sampling": Sampling(40), "num_loss_tokens_to_skip": 1},
        callbacks=[logged, guard],
        **WINDOWS,
    )
    windows = [expected(module.seen[:4]), expected(module.seen[4:])]
    assert len(module.seen) == 6
    assert len({window["completion_length"] for window in windows}) == 2
    for window, at in zip(windows, (3, 5), strict=True):
        for name, value in window.items():
            assert logged.metrics[at][f"train/{name}"] == pytest.approx(value, rel=1e-5), name
    # Before the first step there is nothing, and between two the last step's stays.
    assert "train/loss" not in logged.metrics[2]
    assert logged.metrics[4]["train/loss"] == logged.metrics[3]["train/loss"]
    assert guard._first["distinct_2"] == pytest.approx(windows[0]["distinct_2"], rel=1e-5)
    # The last micro-batch alone would have told something else.
    last = expected(module.seen[3:4])
    assert all(abs(last[name] - windows[0][name]) > 1e-4 for name in ("loss", "kl", "distinct_2"))


def test_metrics_file_and_log_every_n_steps_have_the_windows_values(
    run_cli: Callable[..., None], fit_args: list[str], tmp_path: Path
) -> None:
    def fit(name: str, *more: str) -> list[dict[str, Any]]:
        run_cli(*fit_args, f"--run.name={name}", "--trainer.max_steps=4", *more)
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    # Frozen by a learning rate of 0: a window of four is two windows of two.
    still = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0", "--model=SFTModule"]
    fit_args[:] = [each for each in fit_args if "sampling" not in each and "=SDFT" not in each]
    one = fit("one", *still, "--data.batch_size=1", "--trainer.log_every_n_steps=1")
    four = [*still, "--data.batch_size=1", "--trainer.accumulate_grad_batches=4"]
    all_steps = fit("all", *four, "--trainer.log_every_n_steps=1")
    second = fit("second", *four, "--trainer.log_every_n_steps=2")
    losses = [line["train/loss"] for line in one]
    assert [line["step"] for line in all_steps] == [1, 2, 3, 4]
    assert all_steps[0]["train/loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert [line["step"] for line in second] == [2, 4]
    for line in second:
        whole = all_steps[line["step"] - 1]
        for name in ("loss", "cross_entropy", "student_entropy", "completion_length"):
            assert line[f"train/{name}"] == pytest.approx(whole[f"train/{name}"], rel=1e-6)


class OffUntilTheLast(Engine):
    """Five nats off in all micro-batches of a window but the last."""

    truncates_log_probs = False

    def generate(self, student: StudentPasses, request: RolloutRequest) -> Rollout:
        rollout = TransformersEngine().generate(student, request)
        shift = torch.full_like(rollout.sampled_log_probs, 5.0)
        shift[-2:] = 0.0
        return rollout._replace(sampled_log_probs=rollout.sampled_log_probs - shift)


@pytest.mark.parametrize("stop", [3.0, None])
def test_sampler_that_is_off_in_all_but_the_last_micro_batch_stops_the_run_or_is_told(
    stop: float | None, fit_module: FitModule, caplog: pytest.LogCaptureFixture
) -> None:
    logged = Logged()
    options = {"engine": OffUntilTheLast(), "mismatch": Mismatch(stop_above=stop)}
    options |= {"sampling": Sampling(4)}
    fit = {"model": options, "callbacks": [logged], "accumulate_grad_batches": 4}
    if stop is not None:
        with pytest.raises(UserError, match=r"differ by 3\.\d+ nats a token, stop_above is 3"):
            fit_module(**fit)
        return
    fit_module(**fit)
    assert logged.metrics[-1]["train/sampler/log_prob_difference"] == pytest.approx(3.75, abs=1e-3)
    assert logged.metrics[-1]["train/sampler/log_prob_difference_max"] == pytest.approx(5, abs=1e-3)
    assert logged.metrics[-1]["train/sampler/capped_fraction"] == pytest.approx(0.75, abs=1e-3)
    assert "more than warn_above" in caplog.text


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.mark.parametrize(
    "method", [SFTModule, DFTModule, CPTModule, SFTKLModule, OfflineDistillationModule]
)
def test_last_shorter_window_weighs_as_the_mean_of_its_own_micro_batches(
    method: Any, fit_module: FitModule
) -> None:
    data: dict[str, Any] = {}
    if method is CPTModule:
        from sdft_lightning.data import Columns

        data = {"columns": Columns(context="context", id="id")}
    shorter, whole = Logged(), Logged()
    model = {"optimizer": still}
    fit_module(method, model=model, data=data, callbacks=[shorter], **WINDOWS)
    fit_module(
        method, model=model, data=data, callbacks=[whole], accumulate_grad_batches=2, max_steps=3
    )
    # With weights that stand still, micro-batches five and six are the same in both.
    assert whole.gradients[2].norm() > 1e-3
    torch.testing.assert_close(shorter.gradients[1], whole.gradients[2], rtol=1e-4, atol=1e-7)
    assert shorter.metrics[-1]["train/loss"] == pytest.approx(
        whole.metrics[-1]["train/loss"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("limits", "counts"),
    [
        ({"max_steps": 2}, (4, 2)),
        ({"limit_train_batches": 5, "max_steps": 2}, (4, 1)),
        ({"limit_train_batches": 3, "max_steps": 2, "max_epochs": -1}, (3, 3)),
    ],
)
def test_gradient_of_a_shorter_window_is_the_mean_of_its_micro_batches_in_float64(
    limits: dict[str, Any],
    counts: tuple[int, int],
    fit_module: FitModule,
    make_model: Callable[..., Any],
) -> None:
    class Batches(Logged):
        def __init__(self) -> None:
            super().__init__()
            self.batches: list[Any] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *args: Any) -> None:
            self.batches.append(batch)

    recorder = Batches()
    fit_module(
        SFTModule,
        model={"optimizer": still},
        callbacks=[recorder],
        accumulate_grad_batches=4,
        **limits,
    )
    assert len(recorder.batches) == sum(counts)
    windows = (recorder.batches[: counts[0]], recorder.batches[counts[0] :])
    for gradient, batches in zip(recorder.gradients, windows, strict=True):
        model = copy.deepcopy(make_model()).double()
        losses = []
        for batch in batches:
            for row in range(len(batch.rows)):
                prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
                target = batch.demonstration_ids[row][batch.demonstration_mask[row]]
                logits = model(torch.cat([prompt, target])[None]).logits[0, len(prompt) - 1 : -1]
                losses.append(torch.nn.functional.cross_entropy(logits, target))
        torch.stack(losses).mean().backward()
        exact = torch.cat([each.grad.flatten() for each in model.parameters()])
        assert torch.cosine_similarity(gradient, exact, dim=0) > 1 - 1e-8
        assert float(gradient.norm() / exact.norm()) == pytest.approx(1, abs=1e-5)


def test_run_resumed_inside_a_window_logs_and_weighs_the_micro_batches_that_are_left(
    fit_module: FitModule, tmp_path: Path
) -> None:
    class SaveInside(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 2:  # three of four
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    before, after, alone = Logged(), Logged(), Logged()
    options = {"model": {"optimizer": still}, "accumulate_grad_batches": 4, "max_steps": 1}
    fit_module(SFTModule, callbacks=[before, SaveInside()], **options)
    fit_module(
        SFTModule, callbacks=[alone], **{**options, "accumulate_grad_batches": 1, "max_steps": 4}
    )
    trainer = L.Trainer
    fit, path = trainer.fit, str(tmp_path / "inside.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fit", lambda self, *args: fit(self, *args, ckpt_path=path))
        fit_module(SFTModule, callbacks=[after], **options)
    assert len(after.metrics) == 1  # the fourth micro-batch, at which the optimizer steps
    assert after.metrics[0]["train/loss"] == pytest.approx(alone.metrics[3]["train/loss"], rel=1e-6)
    torch.testing.assert_close(after.gradients[0], alone.gradients[3], rtol=1e-4, atol=1e-7)


def of_two_ranks() -> StepValues:
    """Values of a rank whose other one has the same once more."""
    values = StepValues()
    values.dist_sync_fn = lambda value, group: [value, value]
    values.distributed_available_fn = lambda: True
    return values


def test_means_weigh_and_empty_ones_are_zero() -> None:
    values = of_two_ranks()
    values.update("mean", torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]))
    values.update("mean", torch.tensor([5.0]))
    values.update("empty", torch.zeros(0))
    values.update_largest("largest", torch.tensor(2.0))
    values.update_largest("largest", torch.tensor(1.0))
    values.update_bigrams("distinct", torch.zeros(2, 1).long(), torch.ones(2, 1).bool())
    found = {name: float(value) for name, value in values.take().items()}
    assert found == {"mean": 3.0, "empty": 0.0, "largest": 2.0, "distinct": 1.0}
    assert values.take() == {}
    values.update("other", torch.tensor([4.0]))
    assert values.take() == {"other": 4.0}, "a name of the last window stays there"


def test_what_is_no_number_stays_seen() -> None:
    values = of_two_ranks()
    for value in (1.0, torch.nan, 2.0):
        values.update("mean", torch.tensor(value))
        values.update_largest("largest", torch.tensor(value))
    assert all(bool(value.isnan()) for value in values.take().values())
