"""Whole fits with adapters: what moves, and what a checkpoint holds and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.callbacks import DriftMonitor
from sdft_lightning.data.sets import HeldOut
from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy
from sdft_lightning.models import embedded
from sdft_lightning.models.lora import LoRA, adapter_parameters
from sdft_lightning.modules import (
    OfflineDistillationModule,
    ReinvokeModule,
    SDFTModule,
    SFTKLModule,
    SFTModule,
)
from sdft_lightning.rollout import Sampling
from sdft_lightning.teacher import EMATeacher, FrozenTeacher, LiveTeacher

FitModule = Callable[..., Any]
ADAPTER = LoRA(r=4)


def adamw(lr: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adapter_parameters(model).items()}


class Watch(L.Callback):
    """Keeps the student's adapters after each optimizer step."""

    def __init__(self) -> None:
        self.students: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.students.append(adapters(module.student))

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == len(self.students):
            self.students.append(adapters(module.student))


def test_average_equals_the_formula_and_the_base_stays_bit_for_bit(
    fit_module: FitModule, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch()
    module = fit_module(
        model={"policy": {"lora": ADAPTER}, "teacher": EMATeacher(0.3), "optimizer": adamw(0.01)},
        max_steps=5,
        accumulate_grad_batches=2,
        callbacks=[watch],
    )
    assert len(watch.students) == 6
    expected = {name: value.double() for name, value in watch.students[0].items()}
    for student in watch.students[1:]:
        for name, value in student.items():
            expected[name] = 0.7 * expected[name] + 0.3 * value.double()
    found = adapters(module.teacher.network)
    for name, average in expected.items():
        torch.testing.assert_close(found[name].double(), average, rtol=0, atol=1e-6)
        assert (watch.students[-1][name] - found[name]).abs().max() > 1e-3
    assert module.teacher.network is not module.student  # else it would be sampled from as such
    base = {n.replace(".base_layer", ""): p for n, p in module.student.named_parameters()}
    assert all(torch.equal(base[name], value) for name, value in model.named_parameters())
    seen = [id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in adapter_parameters(module.student).values())
    total = sum(p.numel() for p in module.student.parameters())
    assert f"LoRA: 4,096 of {total:,} parameters" in capsys.readouterr().out


def method_options(method: Any, teacher: Any, original: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"policy": {"lora": ADAPTER}, "optimizer": adamw(0.01)}
    if teacher is not None:
        options["teacher"] = teacher()
    if method is ReinvokeModule:
        options["original"] = {"name": str(original)}
    return options


@pytest.mark.parametrize(
    ("method", "teacher"),
    [
        (SDFTModule, EMATeacher),
        (SDFTModule, FrozenTeacher),
        (SDFTModule, LiveTeacher),
        (OfflineDistillationModule, None),
        (ReinvokeModule, None),
        (SFTModule, None),
        (SFTKLModule, None),
    ],
)
def test_checkpoint_holds_adapters_and_optimizer_only_and_restores_them(
    method: Any,
    teacher: Any,
    fit_module: FitModule,
    module_options: Callable[[dict[str, Any]], dict[str, Any]],
    make_model_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    original = make_model_folder("original", seed=1)
    options = method_options(method, teacher, original)
    module = fit_module(method, model=options, max_steps=2)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    names = list(adapter_parameters(module.student))
    expected = {f"student.{name}" for name in names}
    if teacher is EMATeacher:
        expected |= {f"teacher.model.{name}" for name in names}
    if method is ReinvokeModule:  # the original is another model, which the student does not hold
        expected |= {f"teacher.model.{name}" for name in module.teacher.network.state_dict()}
    assert checkpoint["state_dict"].keys() == expected
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(names)

    fresh = method(**module_options(method_options(method, teacher, original)))
    fresh.configure_model()
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    pairs = [(fresh.student, module.student)]
    if teacher is EMATeacher:
        pairs.append((fresh.teacher.network, module.teacher.network))
        assert fresh.teacher.distance(fresh.student) > 0
    for mine, theirs in pairs:
        restored = adapters(mine)
        assert restored.keys() == set(names)
        assert all(torch.equal(restored[name], value) for name, value in adapters(theirs).items())


def test_the_penalty_holds_to_the_base_without_a_copy_of_it(fit_module: FitModule) -> None:
    module = fit_module(
        SFTKLModule, model={"policy": {"lora": ADAPTER}, "optimizer": adamw(0.01)}, max_steps=3
    )
    of_student = {p.untyped_storage().data_ptr() for p in module.student.parameters()}
    assert all(p.untyped_storage().data_ptr() in of_student for p in module.base.parameters())
    assert float(module.trainer.callback_metrics["train/kl"]) > 1e-6
    assert not adapter_parameters(module.base.network)


def loaded(folder: Path, checkpoint: dict[str, Any], **policy: Any) -> Any:
    module = SDFTModule(policy=Policy(str(folder), **policy))
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    return module


def test_checkpoints_of_other_adapters_bases_and_of_whole_models_are_refused(
    fit_module: FitModule,
    model_folder: Path,
    make_model_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    fit_module(model={"policy": {"lora": ADAPTER}}).trainer.save_checkpoint(tmp_path / "lora.ckpt")
    fit_module().trainer.save_checkpoint(tmp_path / "whole.ckpt")
    lora, whole = (
        torch.load(tmp_path / name, weights_only=True) for name in ("lora.ckpt", "whole.ckpt")
    )
    loaded(model_folder, lora, lora=ADAPTER)
    loaded(model_folder, lora, lora=ADAPTER, weights_dtype="bfloat16")  # the same base, rounded
    other = make_model_folder(seed=1)  # the same shapes
    for folder, checkpoint, options, named in (
        (model_folder, lora, {"lora": LoRA(r=8)}, r"another adapter.*'r': 4.*'r': 8"),
        (model_folder, lora, {"lora": LoRA(r=4, alpha=8)}, r"another adapter.*'alpha': 16"),
        (model_folder, lora, {"lora": LoRA(r=4, target_modules=["q_proj"])}, "another adapter"),
        (model_folder, lora, {"lora": LoRA(r=4, rslora=True)}, "another adapter"),
        (other, lora, {"lora": ADAPTER}, "another base model"),
        (model_folder, lora, {}, r"another adapter.*this run has .* with None"),
        (model_folder, whole, {"lora": ADAPTER}, r"another adapter.* with None, this run"),
    ):
        with pytest.raises(UserError, match=rf"ckpt_path: .*{named}"):
            loaded(folder, checkpoint, **options)


@pytest.mark.parametrize("part", ["student.", "teacher.model."])
def test_a_checkpoint_that_lacks_an_adapter_is_an_error_and_not_taken_as_zero(
    part: str, fit_module: FitModule, tmp_path: Path
) -> None:
    module = fit_module(model={"policy": {"lora": ADAPTER}})
    state = dict(module.state_dict())
    lost = next(name for name in state if name.startswith(part))
    del state[lost]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{lost}"):
        module.load_state_dict(state)


def test_gradient_checkpointing_trains_the_same_adapters(fit_module: FitModule) -> None:
    found = []
    for checkpointing in (False, True):
        module = fit_module(
            SFTModule,
            model={
                "policy": {"lora": ADAPTER, "gradient_checkpointing": checkpointing},
                "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            },
            max_steps=3,
        )
        found.append(adapters(module.student))
    moved = max(float(v.abs().max()) for n, v in found[0].items() if ".lora_B." in n)
    assert moved > 1e-3
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5)


class Drifts(L.Callback):
    """Keeps what the drift was at each validation."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.found.append(float(trainer.callback_metrics["val/drift/others"]))


def test_drift_is_measured_from_the_model_with_its_adapters_off_and_loads_no_second_one(
    fit_module: FitModule, train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdft_lightning.callbacks import drift

    def refuse(*_: Any) -> None:
        raise AssertionError("a second model was loaded")

    monkeypatch.setattr(drift, "load_policy", refuse)
    drifts = Drifts()
    module = fit_module(
        model={"policy": {"lora": ADAPTER}, "optimizer": adamw(0.05)},
        data={
            "validation": str(train_file),
            "held_out": {"others": HeldOut(str(train_file), "contains")},
        },
        max_steps=4,
        val_check_interval=2,
        callbacks=[DriftMonitor(["others"]), drifts],
    )
    assert len(drifts.found) == 2
    assert min(drifts.found) > 1e-3
    for value in adapter_parameters(module.student).values():
        value.data.zero_()
    module.trainer.validate(module, module.trainer.datamodule, verbose=False)
    assert abs(drifts.found[-1]) < 1e-6


@pytest.mark.embedded
@pytest.mark.skipif(
    not embedded.is_prepared(), reason="the embedded model is not in the cache: `make model`"
)
def test_checkpoint_of_the_embedded_model_with_adapters_is_below_60_megabytes(
    fit_module: FitModule, tmp_path: Path
) -> None:
    module = fit_module(
        model={
            "policy": {"name": "embedded", "lora": LoRA()},
            "sampling": Sampling(max_new_tokens=4),
        },
        data={"model_name": "embedded"},
    )
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    numbers = module.student.num_parameters(only_trainable=True)
    assert numbers == 2_442_240
    # student, teacher and two moments of AdamW in float32, and little else
    size = (tmp_path / "a.ckpt").stat().st_size
    assert 16 * numbers < size < 60e6
    torch.load(tmp_path / "a.ckpt", weights_only=True)
