"""Re-invoke: the original model teaches the trained student on bare prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy
from sdft_lightning.models.lora import LoRA
from sdft_lightning.modules import ReinvokeModule
from sdft_lightning.types import PromptBatch, Rollout

FitModule = Callable[..., Any]


class Recorder(L.Callback):
    """Keeps the last batch, its rollout, loss and gradients."""

    batch: PromptBatch
    rollout: Rollout

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients = [each.grad.double().clone() for each in module.student.parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.batch, self.rollout = args[0], outputs["rollout"]
        self.loss = float(outputs["loss"])
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}

    @property
    def gradient(self) -> Tensor:
        return torch.cat([each.flatten() for each in self.gradients])


@pytest.fixture
def prompts(write_rows: Callable[..., Path]) -> dict[str, Any]:
    """General prompts, without demonstrations."""
    rows = [{"id": f"p{i}", "prompt": f"Say {i}"} for i in range(6)]
    return {"train": str(write_rows(rows, "prompts.jsonl"))}


@pytest.fixture
def tuned(make_model_folder: Callable[..., Path]) -> str:
    """A student with other weights than the tiny model, as after SFT."""
    return str(make_model_folder("tuned", seed=1))


def test_unchanged_model_has_no_loss_and_no_gradient(
    fit_module: FitModule, prompts: dict[str, Any], model_folder: Path, tuned: str
) -> None:
    same, other = Recorder(), Recorder()
    original = {"original": {"name": str(model_folder)}}
    fit_module(ReinvokeModule, model=original, data=prompts, callbacks=[same])
    fit_module(
        ReinvokeModule,
        model={**original, "policy": {"name": tuned}},
        data=prompts,
        callbacks=[other],
    )
    assert abs(same.loss) < 1e-6
    assert other.loss > 0.1
    assert same.gradient.norm() < 1e-5 * other.gradient.norm()
    assert same.gradient.abs().max() < 1e-6


def test_loss_and_gradient_equal_forward_kl_from_the_original_on_the_bare_prompt_in_float64(
    fit_module: FitModule, model_folder: Path, tuned: str, make_model: Callable[..., Any]
) -> None:
    recorder = Recorder()
    # The rows of this file have demonstrations: they must not reach the teacher.
    fit_module(
        ReinvokeModule,
        model={"original": {"name": str(model_folder)}, "policy": {"name": tuned}},
        callbacks=[recorder],
    )
    student, original = make_model(seed=1).double(), make_model().double()
    batch, rollout, rows = recorder.batch, recorder.rollout, []
    for row in range(2):
        completion = rollout.completion_ids[row][rollout.completion_mask[row]]
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        ids = torch.cat([prompt, completion]).unsqueeze(0)  # (1, P + T)
        place = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            p = original(input_ids=ids).logits[0, place].log_softmax(-1)  # (T, V)
        q = student(input_ids=ids).logits[0, place].log_softmax(-1)  # (T, V)
        rows.append((p.exp() * (p - q)).sum(-1).mean())
    loss = torch.stack(rows).mean()
    loss.backward()

    assert batch.teacher_prompt_ids.shape[1] == batch.demonstration_ids.shape[1] == 0
    assert [row.demonstration for row in batch.rows] == [[], []]
    assert recorder.loss == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.cat([each.grad.flatten() for each in student.parameters()])
    assert torch.cosine_similarity(recorder.gradient, expected, dim=0) > 1 - 1e-8
    assert float(recorder.gradient.norm() / expected.norm()) == pytest.approx(1, abs=1e-5)


def test_teacher_is_the_original_throughout_and_the_student_comes_nearer(
    fit_module: FitModule,
    prompts: dict[str, Any],
    model_folder: Path,
    tuned: str,
    make_model: Callable[..., Any],
) -> None:
    first, last = Recorder(), Recorder()
    options = {
        "original": {"name": str(model_folder)},
        "policy": {"name": tuned},
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    }
    fit_module(ReinvokeModule, model=options, data=prompts, callbacks=[first])
    module = fit_module(
        ReinvokeModule,
        model=options,
        data=prompts,
        callbacks=[last],
        max_steps=30,
        log_every_n_steps=1,
    )
    for name, value in make_model().state_dict().items():
        assert torch.equal(module.teacher.network.state_dict()[name], value)
    assert last.loss < 0.5 * first.loss
    assert not module.teacher.training
    assert not any(each.requires_grad for each in module.teacher.parameters())


def test_original_is_loaded_in_float32_though_the_student_trains_in_bfloat16(
    fit_module: FitModule, prompts: dict[str, Any], model_folder: Path, tuned: str
) -> None:
    module = fit_module(
        ReinvokeModule,
        model={
            "original": {"name": str(model_folder)},
            "policy": {"name": tuned, "weights_dtype": "bfloat16"},
        },
        data=prompts,
    )
    assert {each.dtype for each in module.teacher.parameters()} == {torch.float32}
    assert {each.dtype for each in module.student.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, ["another architecture", "num_hidden_layers"]),
        ({"vocab_size": 280}, ["another architecture", "vocab_size"]),
    ],
)
def test_original_of_another_kind_is_refused_before_anything_is_loaded(
    changes: dict[str, Any],
    words: list[str],
    make_model_folder: Callable[..., Path],
    model_folder: Path,
) -> None:
    other = make_model_folder("strange", **changes)
    module = ReinvokeModule(original=Policy(str(other)), policy=Policy(str(model_folder)))
    with pytest.raises(UserError) as error:
        module.check_before_fit([])
    assert all(word in str(error.value) for word in ["model.original.name", *words])
    assert "SFT started from" in str(error.value)
    assert module.student is None


def test_original_with_another_tokenizer_is_refused(
    make_model_folder: Callable[..., Path], model_folder: Path, make_tokenizer: Callable[..., Any]
) -> None:
    folder = make_model_folder("words")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["routing"])
    tokenizer.save_pretrained(folder)
    module = ReinvokeModule(original=Policy(str(folder)), policy=Policy(str(model_folder)))
    with pytest.raises(UserError, match=r"another vocabulary .*routing"):
        module.check_before_fit([])


@pytest.mark.parametrize(
    "options", [{"weights_dtype": "bfloat16"}, {"gradient_checkpointing": True}, {"lora": LoRA()}]
)
def test_original_takes_no_option_that_would_do_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"model\.original\.{next(iter(options))}: got .*name"):
        ReinvokeModule(original=Policy(**options))


def test_original_must_be_named(
    fit_args: list[str], run_cli: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    told = "model.original.name: ReinvokeModule needs it and it is not given"
    with pytest.raises(UserError, match=told):
        ReinvokeModule()
    with pytest.raises(SystemExit) as ended:
        run_cli(*["--model=ReinvokeModule" if a == "--model=SDFTModule" else a for a in fit_args])
    assert ended.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_original_is_loaded_with_its_own_attention_or_the_students(model_folder: Path) -> None:
    for own, found in ((None, "eager"), ("sdpa", "sdpa")):
        original = Policy(str(model_folder), attn_implementation=own)
        policy = Policy(str(model_folder), attn_implementation="eager")
        module = ReinvokeModule(original=original, policy=policy)
        module.configure_model()
        assert module.teacher.network.config._attn_implementation == found
        assert module.student.config._attn_implementation == "eager"
