"""Rows to retain: the student is held to the model as it was, on answers of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.callbacks import MetricsLog
from sdft_lightning.errors import UserError
from sdft_lightning.models.lora import LoRA
from sdft_lightning.modules import (
    CPTModule,
    DFTModule,
    OfflineDistillationModule,
    SDFTModule,
    SFTKLModule,
    SFTModule,
)
from sdft_lightning.rollout import Sampling, TransformersEngine
from sdft_lightning.teacher import EMATeacher, FrozenTeacher, LiveTeacher
from sdft_lightning.types import PromptBatch

Fit = Callable[..., Any]
COPY = {"initial_copy": True}


@pytest.fixture
def retain(tmp_path: Path) -> dict[str, Any]:
    """Options of data: two of four rows of a batch are to be retained."""
    path = tmp_path / "retain.jsonl"
    rows = [{"prompt": f"Tell me of the number {i}."} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "retain": str(path),
        "retain_share": 0.5,
        "retain_max_new_tokens": 6,
        "batch_size": 4,
    }


def logged(folder: Path, name: str) -> list[float]:
    (file,) = folder.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def sgd(rate: float) -> dict[str, Any]:
    return {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=rate)}


METHODS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "ema": (SDFTModule, {"teacher": EMATeacher(0.5), **COPY}, True),
    "live": (SDFTModule, {"teacher": LiveTeacher(), **COPY}, True),
    "frozen": (SDFTModule, {"teacher": FrozenTeacher()}, False),
    "adapters": (SDFTModule, {"policy": {"lora": LoRA(r=2)}}, True),
    "offline": (OfflineDistillationModule, {}, False),
    "sft": (SFTModule, COPY, True),
    "sft with adapters": (SFTModule, {"policy": {"lora": LoRA(r=2)}}, True),
    "dft": (DFTModule, COPY, True),
    "sft with kl": (SFTKLModule, {}, False),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_holds_the_student_to_the_model_as_it_was(
    name: str, fit_module: Fit, retain: dict[str, Any], tmp_path: Path
) -> None:
    method, options, keeps_one_more = METHODS[name]
    module = fit_module(
        method,
        {**options, **sgd(0.5)},
        data=retain,
        callbacks=[MetricsLog()],
        max_steps=3,
        log_every_n_steps=1,
    )
    values = logged(tmp_path, "train/retained_kl")
    assert len(values) == 3
    assert values[0] == pytest.approx(0, abs=1e-5)  # the student is the model as it was
    assert min(values[1:]) > 1e-6  # and then no more
    assert (module.initial is not None) == keeps_one_more
    assert all(seconds > 0 for seconds in logged(tmp_path, "perf/retained_seconds"))


def test_the_loss_is_the_mean_over_all_rows_of_the_batch(
    fit_module: Fit, retain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fit_module(SFTModule, {**COPY, **sgd(0.5)}, data=retain, max_steps=2)
    batch = next(iter(module.trainer.datamodule.train_dataloader()))
    assert batch.retained is not None
    batch = batch._replace(rows=batch.rows[:1])  # what counts is how many rows there are
    seen: dict[str, Any] = {}
    take = module.retained_rows._window.take

    def taking(*args: Any) -> Any:
        seen["rollout"] = take(*args)
        return seen["rollout"]

    monkeypatch.setattr(module.retained_rows._window, "take", taking)
    other = torch.tensor(2.0)
    loss = module.retained_rows.beside(other, batch)
    expected = plain_kl(module, batch.retained, seen["rollout"])
    assert expected > 1e-5
    assert float(loss) == pytest.approx((2.0 * 1 + expected * 2) / 3, rel=1e-4)
    module.zero_grad()
    loss.backward()
    assert any(each.grad is not None and each.grad.any() for each in module.student.parameters())
    assert all(each.grad is None for each in module.initial.parameters())


def plain_kl(module: Any, retained: PromptBatch, rollout: Any) -> float:
    """KL(initial ‖ student): mean over tokens, then over answers; whole logits, row by row."""
    means = []
    for row in range(len(retained.rows)):
        prompt = retained.prompt_ids[row][retained.prompt_mask[row]]
        answer = rollout.completion_ids[row][rollout.completion_mask[row]]
        ids = torch.cat([prompt, answer]).unsqueeze(0)
        with torch.no_grad():
            mine, before = (
                model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                for model in (module.student, module.initial.network)
            )
        kl: Tensor = (before.exp() * (before - mine)).sum(-1)  # (T,)
        means.append(float(kl.mean()))
    return sum(means) / len(means)


def test_without_a_share_a_run_is_the_one_without_such_rows_bit_for_bit(
    fit_module: Fit, retain: dict[str, Any], tmp_path: Path
) -> None:
    plain = fit_module(SDFTModule, sgd(0.5), data={"batch_size": 4}, max_steps=3)
    other = {**retain, "retain_share": 0.0}
    none = fit_module(
        SDFTModule, sgd(0.5), data=other, max_steps=3, default_root_dir=str(tmp_path / "none")
    )
    assert plain.state_dict().keys() == none.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(none.state_dict()[name], tensor), name


def test_kl_is_of_the_demonstrations_alone(
    fit_module: Fit, retain: dict[str, Any], tmp_path: Path
) -> None:
    """With a frozen student both runs see the same demonstrations and log the same KL of them."""
    kls = []
    for name, options in (("with", retain), ("without", {"batch_size": 2})):
        folder = tmp_path / name
        fit_module(
            SDFTModule,
            {**sgd(0.0), **(COPY if name == "with" else {})},
            data=options,
            callbacks=[MetricsLog()],
            max_steps=2,
            log_every_n_steps=1,
            default_root_dir=str(folder),
        )
        kls.append(logged(folder, "train/kl"))
    assert kls[0] == pytest.approx(kls[1], abs=1e-6)
    assert max(kls[0]) > 1e-3


def test_rows_of_both_kinds_are_sampled_in_one_call(
    fit_module: Fit, retain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoding loop, or a hand-over of weights to vLLM, for each kind would double their time."""
    asked: list[list[int]] = []
    sample = TransformersEngine.sample

    def spy(self: Any, student: Any, requests: Any) -> Any:
        asked.append([each.sampling.max_new_tokens for each in requests])
        return sample(self, student, requests)

    monkeypatch.setattr(TransformersEngine, "sample", spy)
    options = {**sgd(0.5), **COPY, "sampling": Sampling(max_new_tokens=3)}
    fit_module(SDFTModule, options, data=retain, max_steps=2, accumulate_grad_batches=2)
    assert asked == [[3, 3, 6, 6]] * 2


REFUSED: dict[str, tuple[Any, dict[str, Any], bool, str]] = {
    "moving teacher": (SDFTModule, {}, True, r"SDFTModule does not keep .*initial_copy=true"),
    "no teacher": (SFTModule, {}, True, r"SFTModule does not keep .*4 bytes a parameter"),
    "no rows": (SDFTModule, COPY, False, r"initial_copy: got true, and there are no rows to"),
    "frozen": (
        SDFTModule,
        {**COPY, "teacher": FrozenTeacher()},
        True,
        "initial_copy: got true, and the teacher of the rows to retain is there without it",
    ),
    "adapters": (SFTModule, {**COPY, "policy": {"lora": LoRA(r=2)}}, True, "is there without it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_copy_is_made_where_it_is_asked_for_and_needed_and_nowhere_else(
    name: str, fit_module: Fit, retain: dict[str, Any]
) -> None:
    method, options, retains, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        fit_module(method, options, data=retain if retains else {})


def test_rows_that_leave_no_room_for_demonstrations_are_refused(
    fit_module: Fit, retain: dict[str, Any]
) -> None:
    data = {**retain, "batch_size": 1}
    with pytest.raises(UserError, match=r"data\.retain_share: 0\.5 of batches of 1 rows leaves 0"):
        fit_module(SFTModule, COPY, data=data)


def test_continued_pre_training_retains_answers_to_prompts(
    fit_module: Fit, retain: dict[str, Any], tmp_path: Path
) -> None:
    from sdft_lightning.data import Columns

    fit_module(
        CPTModule,
        {**COPY, **sgd(0.5)},
        data={**retain, "columns": Columns(context="context", id="id")},
        callbacks=[MetricsLog()],
        max_steps=2,
        log_every_n_steps=1,
    )
    assert logged(tmp_path, "train/retained_kl")[1] > 1e-6


def test_a_checkpoint_with_the_copy_is_exported_and_validated_without_it(
    fit_args: list[str],
    run_cli: Callable[..., None],
    retain: dict[str, Any],
    model_folder: Path,
    train_file: Path,
    tmp_path: Path,
) -> None:
    given = [f"--data.{name}={value}" for name, value in retain.items()]
    run_cli(*fit_args, "--model.initial_copy=true", *given, "--run.name=kept")
    (path,) = (tmp_path / "runs" / "kept" / "checkpoints").glob("last.ckpt")
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert any(name.startswith("initial.") for name in saved)
    model = [f"--model.policy.name={model_folder}", f"--ckpt_path={path}"]
    run_cli("export", "--model=SDFTModule", *model, f"--output_dir={tmp_path / 'out'}")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    rows = [f"--data.validation={train_file}", "--data.grader=contains"]
    rows += ["--data.columns.reference=reference", "--model.evaluation.max_new_tokens=4"]
    run_cli("validate", "--model=SDFTModule", *model, *rows)
