"""What a step keeps for the next one, and what it does not compute or hold twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.forward import hidden
from sdft_lightning.forward.fused import completion_states
from sdft_lightning.forward.fused.structure import Decoder
from sdft_lightning.modules import SDFTModule, SFTModule
from sdft_lightning.rollout import Sampling, StudentPasses, student

FitModule = Callable[..., Any]


class Watch(L.Callback):
    """Whether the student has gradients, when a batch starts and when it ends."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.start = has_gradients(module)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.seen.append((self.start, has_gradients(module)))


def has_gradients(module: Any) -> bool:
    return any(each.grad is not None for each in module.student.parameters())


def test_gradients_are_dropped_between_windows_when_callbacks_have_seen_them(
    fit_module: FitModule,
) -> None:
    watch = Watch()
    fit_module(
        SFTModule,
        data={"batch_size": 1},
        callbacks=[watch],
        max_steps=2,
        max_epochs=-1,
        accumulate_grad_batches=2,
    )
    assert watch.seen == [(False, True), (True, True), (False, True), (True, True)]


@pytest.mark.parametrize("dtype", ["bfloat16", "same"])
def test_student_is_computed_with_the_weights_that_were_rounded_to_sample_with(
    fit_module: FitModule, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    rounded: list[Decoder | None] = []

    def spy(*arguments: Any) -> Tensor:
        rounded.append(arguments[-2])
        return completion_states(*arguments)

    class Compared(SDFTModule):
        """Compares the copy with the student at each step."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            copied, head = self.passes._rounded(), self.gather_head()
            assert (copied is None) is (dtype == "same")
            assert (head.rounded is None) is (dtype == "same")
            for name, weight in self.student.named_parameters() if copied is not None else ():
                assert torch.equal(copied.get_parameter(name), weight.bfloat16()), name
            return outputs

    monkeypatch.setattr(hidden, "completion_states", spy)
    fit_module(
        Compared,
        model={"policy": {"sampling_dtype": dtype}, "sampling": Sampling(max_new_tokens=4)},
        max_steps=3,
        max_epochs=-1,
        precision="bf16-mixed",
    )
    assert [each is not None for each in rounded] == [dtype == "bfloat16", False] * 3


def test_a_copy_of_an_older_step_is_not_taken_for_the_student(model: Any) -> None:
    passes = StudentPasses("bfloat16")
    copied = passes.at(model, 3).sampler()
    assert passes.at(model, 3)._rounded() is copied
    assert passes.at(model, 4)._rounded() is None
    assert passes.at(copy.deepcopy(model), 3)._rounded() is None
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    assert passes.at(model, 3)._rounded() is None


class Steps(L.Callback):
    """Losses, completions and how much of the prompts was computed again."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.completions: list[list[int]] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.completions += outputs["rollout"].completion_ids.tolist()


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("rounded", ["no", "copy", "kept"])
def test_prompts_of_a_rollout_serve_the_student_and_change_nothing(
    fit_module: FitModule,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    rounded: str,
    samples: int,
) -> None:
    request.getfixturevalue("no_bfloat16_products" if rounded == "kept" else "bfloat16_products")
    rate = 1e-5 if rounded == "kept" else 1e-3  # rounded prompts are sampled from in one run only
    shared: list[bool] = []

    def spy(*arguments: Any) -> Tensor:
        if torch.is_grad_enabled():
            before = sum(each.is_stored for each in arguments[-1])
        found = completion_states(*arguments)
        if torch.is_grad_enabled():
            shared.append(sum(each.is_stored for each in arguments[-1]) < before)
        return found

    monkeypatch.setattr(hidden, "completion_states", spy)
    found = []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(student, "_pair", lambda *_: None)
        steps = Steps()
        module = fit_module(
            SDFTModule,
            model={
                "policy": {"sampling_dtype": "bfloat16" if rounded == "copy" else "same"},
                "sampling": Sampling(max_new_tokens=9, completions_per_prompt=samples),
                "optimizer": lambda p: torch.optim.AdamW(p, lr=rate),
            },
            callbacks=[steps],
            max_steps=4,
            max_epochs=-1,
            accumulate_grad_batches=2,
            precision="32-true" if rounded == "no" else "bf16-mixed",
        )
        assert shared == [shares] * 8
        assert module.passes._stored == []
        shared.clear()
        found.append(steps)
    if rounded == "no":
        assert found[0].completions == found[1].completions
    # Of a random model, rounding may choose other tokens, which are as likely.
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-3 if rounded == "no" else 0.25)


def test_a_float32_student_is_not_computed_with_rounded_weights(
    fit_module: FitModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: list[Decoder | None] = []

    def spy(*arguments: Any) -> Tensor:
        rounded.append(arguments[-2])
        return completion_states(*arguments)

    monkeypatch.setattr(hidden, "completion_states", spy)
    fit_module(SDFTModule, model={"policy": {"sampling_dtype": "bfloat16"}}, precision="32-true")
    assert rounded == [None, None]


def test_nothing_is_kept_where_no_gradient_is_wanted(fit_module: FitModule) -> None:
    module = fit_module(SDFTModule)
    rows = module.trainer.datamodule
    batch = rows.batch_of(rows.training_rows()[:2])
    with torch.no_grad():
        module.sample_rollouts([batch], 0)
        assert module.passes._stored == []
    module.sample_rollouts([batch], 0)
    assert len(module.passes._stored) == 1
    module.teardown("fit")
    assert module.passes._stored == []


def test_loaded_weights_do_not_meet_prompts_that_others_have_read(fit_module: FitModule) -> None:
    module = fit_module(SDFTModule)
    rows = module.trainer.datamodule
    module.sample_rollouts([rows.batch_of(rows.training_rows()[:2])], 0)
    assert len(module.passes._stored) == 1
    module.forget_copies()
    assert module.passes._stored == []


def test_teachers_completions_share_nothing_with_the_student(
    fit_module: FitModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "_pair", None)  # not reached
    fit_module(SDFTModule, model={"generate_from_teacher": True})
