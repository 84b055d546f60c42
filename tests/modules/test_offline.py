"""Offline distillation: completions that are written once, and SDFT's loss on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy
from sdft_lightning.modules import OfflineDistillationModule, SDFTModule, sdft_variants
from sdft_lightning.modules.completions import read_completions
from sdft_lightning.modules.sdft_variants import COMPLETIONS_KEY
from sdft_lightning.rollout import Sampling, student
from sdft_lightning.teacher import FrozenTeacher
from sdft_lightning.types import PromptBatch, Rollout, Tokens

FitModule = Callable[..., Any]


class Recorder(L.Callback):
    """Keeps each completion with its row and step, and the last step's loss and gradients."""

    def __init__(self) -> None:
        self.completions: list[tuple[str, list[int]]] = []
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        parameters = module.student.parameters()
        self.gradients.append(torch.cat([p.grad.double().flatten() for p in parameters]))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        batch: PromptBatch = args[0]
        rollout: Rollout = outputs["rollout"]
        samples = len(rollout.completion_ids) // len(batch.rows)
        self.losses.append(float(outputs["loss"]))
        for place, (ids, mask) in enumerate(
            zip(rollout.completion_ids, rollout.completion_mask, strict=True)
        ):
            self.completions.append((batch.rows[place // samples].id, ids[mask].tolist()))

    def by_row(self) -> dict[str, set[tuple[int, ...]]]:
        found: dict[str, set[tuple[int, ...]]] = {}
        for row_id, ids in self.completions:
            found.setdefault(row_id, set()).add(tuple(ids))
        return found


def fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call that samples."""
    import sdft_lightning.rollout.student as file_of_passes

    sizes: list[int] = []
    generate = file_of_passes.generate_rollout

    def counted(model: Any, prompts: Tokens, *args: Any, **more: Any) -> Rollout:
        sizes.append(len(prompts.ids))
        return generate(model, prompts, *args, **more)

    monkeypatch.setattr(file_of_passes, "generate_rollout", counted)
    return sizes


def test_teacher_writes_each_row_once_and_every_epoch_trains_on_the_same_text(
    fit_module: FitModule, written: list[int]
) -> None:
    recorder = Recorder()
    # 12 rows in batches of 5: 2 are left out of an epoch, other ones each time.
    fit_module(
        OfflineDistillationModule,
        model={"optimizer": fast},
        data={"batch_size": 5},
        max_steps=8,
        callbacks=[recorder],
    )
    found = recorder.by_row()
    assert len(recorder.completions) == 40
    assert len(found) == 12
    assert all(len(completions) == 1 for completions in found.values())
    assert sum(written) == 12
    # By then the student has moved: the text is not its own.
    assert recorder.losses[-1] < recorder.losses[0]


def test_generate_from_teacher_of_sdft_writes_anew_each_step_and_offline_does_not(
    fit_module: FitModule,
) -> None:
    def texts(method: Any, **options: Any) -> list[int]:
        recorder = Recorder()
        fit_module(
            method,
            model={"sampling": Sampling(8, temperature=1.5), **options},
            data={"batch_size": 6},
            max_steps=6,
            callbacks=[recorder],
        )
        return [len(completions) for completions in recorder.by_row().values()]

    assert texts(OfflineDistillationModule) == [1] * 12
    fresh = texts(SDFTModule, teacher=FrozenTeacher(), generate_from_teacher=True)
    assert fresh == [3] * 12


def test_text_is_the_teachers_after_its_own_prompt_and_depends_on_the_seed_alone(
    fit_module: FitModule,
) -> None:
    def texts(method: Any, batch_size: int, **options: Any) -> dict[str, set[tuple[int, ...]]]:
        recorder = Recorder()
        fit_module(
            method,
            model=options,
            data={"batch_size": batch_size},
            max_steps=12 // batch_size,
            callbacks=[recorder],
        )
        return recorder.by_row()

    ours = texts(OfflineDistillationModule, 12, seed=3)
    # SDFT's step 0 samples with the same numbers.
    teacher = texts(SDFTModule, 12, seed=3, generate_from_teacher=True)
    assert ours == teacher
    assert ours == texts(OfflineDistillationModule, 4, seed=3)
    assert ours != texts(OfflineDistillationModule, 12, seed=4)
    assert ours != texts(SDFTModule, 12, seed=3)


@pytest.mark.parametrize("samples", [1, 2])
def test_with_the_students_own_samples_loss_and_gradient_are_those_of_sdft_with_a_frozen_teacher(
    samples: int,
    fit_module: FitModule,
    tmp_path: Path,
    written: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Else SDFT would take its forward pass from the rollout, rounded in another order.
    monkeypatch.setattr(student, "_pair", lambda *_: None)
    options = {"sampling": Sampling(8, completions_per_prompt=samples), "optimizer": fast}
    sdft, offline = Recorder(), Recorder()
    steps = {"max_steps": 3, "data": {"batch_size": 4}}  # an epoch: each row once
    fit_module(model={**options, "teacher": FrozenTeacher()}, callbacks=[sdft], **steps)
    written.clear()
    lines = [{"id": row_id, "token_ids": ids} for row_id, ids in sdft.completions]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    fit_module(
        OfflineDistillationModule,
        model={**options, "completions": str(path)},
        callbacks=[offline],
        **steps,
    )

    assert written == []
    assert offline.completions == sdft.completions
    assert min(sdft.losses) > 0.01
    assert offline.losses == pytest.approx(sdft.losses, rel=1e-6)
    for mine, theirs in zip(offline.gradients, sdft.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_checkpoint_keeps_what_the_teacher_wrote_and_a_resumed_run_writes_nothing(
    fit_module: FitModule, tmp_path: Path, written: list[int]
) -> None:
    first = Recorder()
    module = fit_module(
        OfflineDistillationModule, data={"batch_size": 6}, max_steps=2, callbacks=[first]
    )
    module.trainer.save_checkpoint(tmp_path / "kept.ckpt")
    saved = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert saved[COMPLETIONS_KEY]["row_ids"] == sorted(first.by_row())
    assert sum(written) == 12

    resumed = OfflineDistillationModule(
        policy=Policy(module.policy.name), seed=99, sampling=Sampling(8)
    )
    resumed.configure_model()
    resumed.on_load_checkpoint(saved)
    batch = module.trainer.datamodule.batch_of(module.trainer.datamodule.training_rows())
    (again,) = resumed.sample_rollouts([batch], 5)
    assert sum(written) == 12
    for row, ids, mask in zip(batch.rows, again.completion_ids, again.completion_mask, strict=True):
        assert first.by_row()[row.id] == {tuple(ids[mask].tolist())}
    assert again.sampled_log_probs.isnan().all()


def test_given_completions_are_not_saved_and_a_row_without_one_is_never_written_by_the_teacher(
    fit_module: FitModule, tmp_path: Path, make_rows: Callable[[int], list[dict[str, Any]]]
) -> None:
    path = tmp_path / "some.jsonl"
    lines = [{"id": row["id"], "completion": "So."} for row in make_rows(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    module = fit_module(OfflineDistillationModule, model={"completions": str(path)})
    module.trainer.save_checkpoint(tmp_path / "given.ckpt")
    saved = torch.load(tmp_path / "given.ckpt", weights_only=True)
    assert saved[COMPLETIONS_KEY]["row_ids"] == []

    rows = [row._replace(id="stranger") for row in module.trainer.datamodule.training_rows()[:1]]
    with pytest.raises(UserError, match=r"some\.jsonl has 0 completions .*'stranger'"):
        module.sample_rollouts([module.trainer.datamodule.batch_of(rows)], 0)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match=r"line 12: .*has 0 completions .*'row-11'"):
        fit_module(OfflineDistillationModule, model={"completions": str(path)})


def test_file_of_completions_is_read_once_a_fit_and_a_checkpoint_does_not_put_it_out(
    fit_module: FitModule,
    tmp_path: Path,
    make_rows: Callable[[int], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, reads = tmp_path / "all.jsonl", []
    lines = [{"id": row["id"], "completion": "So."} for row in make_rows(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def counted(*arguments: Any) -> Any:
        reads.append(arguments)
        return read_completions(*arguments)

    monkeypatch.setattr(sdft_variants, "read_completions", counted)
    module = fit_module(OfflineDistillationModule, model={"completions": str(path)})
    assert len(reads) == 1
    module.trainer.save_checkpoint(tmp_path / "given.ckpt")
    module.on_load_checkpoint(torch.load(tmp_path / "given.ckpt", weights_only=True))
    assert len(module.kept) == 12
